//! Which drafts stand, in chains and in trees: `kernels/verify.cu`.

use super::device::Address;
use super::memory::Memory;
use super::sample::{BLOCK, Distributions, SHARED_BYTES};
use super::{Cuda, count};
use crate::error::at_most;
use crate::{Drafts, Error, Verified};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Node {
    token: u32,
    parent: u32,
    from: u32,
    unused: u32,
    accept: u64,
    random: u64,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Request {
    node: u32,
    count: u32,
    row: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Outcome {
    accepted: u32,
    token: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct VerifyArgument {
    weights: Address,
    totals: Address,
    drafted: Address,
    drafted_totals: Address,
    nodes: Address,
    requests: Address,
    work: Address,
    path: Address,
    out: Address,
    vocabulary: u32,
    unused: u32,
}

impl Cuda {
    /// [`Sampling::verify`](crate::Sampling::verify), all checked, of some requests.
    pub(super) fn walk(
        &self,
        target: &Distributions,
        drafted: Option<&Distributions>,
        requests: &[Drafts<'_>],
    ) -> Result<Vec<Verified>, Error> {
        let (nodes, places) = flatten(drafted.is_some(), requests)?;
        let device = &self.device;
        let on_device = Memory::of(device, bytemuck::cast_slice(&nodes))?;
        let places_on_device = Memory::of(device, bytemuck::cast_slice(&places))?;
        let work = if drafted.is_some() { requests.len() * target.vocabulary * 4 } else { 0 };
        let work = Memory::new(device, work)?;
        let (mut path, mut outcomes) =
            (vec![0_u32; nodes.len()], vec![Outcome { accepted: 0, token: 0 }; requests.len()]);
        let path_on_device = Memory::new(device, nodes.len() * 4)?;
        let out = Memory::new(device, size_of_val(&outcomes[..]))?;
        let argument = VerifyArgument {
            weights: target.weights.address(),
            totals: target.totals.address(),
            drafted: drafted.map_or(0, |drafted| drafted.weights.address()),
            drafted_totals: drafted.map_or(0, |drafted| drafted.totals.address()),
            nodes: on_device.address(),
            requests: places_on_device.address(),
            work: work.address(),
            path: path_on_device.address(),
            out: out.address(),
            vocabulary: count("verify", "vocabulary", target.vocabulary)?,
            unused: 0,
        };
        let blocks = count("verify", "requests", requests.len())?;
        self.start("verify", "verify", blocks, BLOCK, SHARED_BYTES, &argument)?;
        device.download(path_on_device.address(), bytemuck::cast_slice_mut(&mut path))?;
        device.download(out.address(), bytemuck::cast_slice_mut(&mut outcomes))?;
        let verified = |(place, outcome): (&Request, &Outcome)| Verified {
            // The kernel's node 0 is the request's last token.
            accepted: path[place.node as usize..][..outcome.accepted as usize]
                .iter()
                .map(|node| node - 1)
                .collect(),
            token: outcome.token,
        };
        Ok(places.iter().zip(&outcomes).map(verified).collect())
    }
}

/// All trees one after the other, each with its root; and where each is. Rows of the drafts count if they were `drawn`
/// from distributions that are known.
fn flatten(drawn: bool, requests: &[Drafts<'_>]) -> Result<(Vec<Node>, Vec<Request>), Error> {
    let (mut nodes, mut places) = (Vec::new(), Vec::with_capacity(requests.len()));
    for request in requests {
        places.push(Request {
            node: count("verify", "drafts", nodes.len())?,
            count: count("verify", "drafts of a request", request.random.len())?,
            row: count("verify", "row of the target", request.row)?,
            unused: 0,
        });
        nodes.push(Node { random: request.random[0], ..bytemuck::Zeroable::zeroed() });
        for (draft, &random) in request.drafts.iter().zip(&request.random[1..]) {
            let parent = draft.parent.map_or(0, |parent| parent + 1);
            let from = if drawn { count("verify", "row of the drafts", draft.from)? } else { 0 };
            nodes.push(Node { token: draft.token, parent, from, unused: 0, accept: draft.accept, random });
        }
    }
    at_most("verify", "drafts", nodes.len(), u32::MAX as usize)?;
    Ok((nodes, places))
}
