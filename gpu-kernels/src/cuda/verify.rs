//! Which drafts stand, in chains and in trees: `kernels/verify.cu`.

use super::device::Address;
use super::memory::Memory;
use super::sample::{BLOCK, Distributions, SHARED_BYTES};
use super::{Cuda, count};
use crate::Error;
use crate::error::{at_most, below, same};

/// The drafts of one request: a tree below its last token, or a chain, which is a tree without branches.
#[derive(Clone, Copy, Debug)]
pub struct Drafts<'a> {
    /// Row of the target's distributions that follows the request's last token; the row after draft `i` is `row +
    /// 1 + i`.
    pub row: usize,
    /// Each after its parent; of equal parents, in the order in which they are tried.
    pub drafts: &'a [Draft],
    /// Where draws fall, as fractions of 2^64: after the last token, then after each draft.
    pub random: &'a [u64],
}

/// A drafted token.
#[derive(Clone, Copy, Debug)]
pub struct Draft {
    /// Its number.
    pub token: u32,
    /// The draft that it follows, by its index; `None`: the request's last token.
    pub parent: Option<u32>,
    /// Row of the distribution that it was drawn from. Not used without those.
    pub from: usize,
    /// Where the draw falls that decides whether it stands, as a fraction of 2^64. Not used without distributions.
    pub accept: u64,
}

/// What became of a request's drafts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Indices of the drafts that stand, each the parent of the next.
    pub accepted: Vec<u32>,
    /// The token after them; `u32::MAX` when nothing is allowed there.
    pub token: u32,
}

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
    /// Walks down each request's drafts as far as they stand against the target's distributions, and draws the
    /// token after them.
    ///
    /// Without `drafted`, the tokens are exactly those that [`Cuda::sample`] gives one at a time with the same
    /// random numbers. With the distributions that the drafts were drawn from, a draft stands with probability
    /// `p(x) / q(x)`, and what follows a refused one is drawn from what `p` has more than `q` (arXiv 2211.17192,
    /// 2305.09781): more drafts stand, and the tokens are distributed as the target's all the same. At temperature
    /// 0 both are greedy.
    ///
    /// # Errors
    /// When a row, a token or a parent is not there, lengths disagree, or the device fails.
    pub fn verify(
        &self,
        target: &Distributions,
        drafted: Option<&Distributions>,
        requests: &[Drafts<'_>],
    ) -> Result<Vec<Verified>, Error> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(drafted) = drafted {
            same("verify", "vocabulary of the drafts", drafted.vocabulary, target.vocabulary)?;
        }
        let (nodes, places) = flatten(target, drafted, requests)?;
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

/// All trees one after the other, checked, each with its root; and where each is.
fn flatten(
    target: &Distributions,
    drafted: Option<&Distributions>,
    requests: &[Drafts<'_>],
) -> Result<(Vec<Node>, Vec<Request>), Error> {
    let (mut nodes, mut places) = (Vec::new(), Vec::with_capacity(requests.len()));
    for request in requests {
        let last = request.row.saturating_add(request.drafts.len());
        below("verify", "row of the target", last, target.rows)?;
        same("verify", "random numbers", request.random.len(), request.drafts.len() + 1)?;
        places.push(Request {
            node: count("verify", "drafts", nodes.len())?,
            count: count("verify", "drafts of a request", request.random.len())?,
            row: count("verify", "row of the target", request.row)?,
            unused: 0,
        });
        nodes.push(Node { random: request.random[0], ..bytemuck::Zeroable::zeroed() });
        for (index, (draft, &random)) in request.drafts.iter().zip(&request.random[1..]).enumerate() {
            below("verify", "drafted token", draft.token as usize, target.vocabulary)?;
            if let Some(parent) = draft.parent {
                below("verify", "parent of a draft", parent as usize, index)?;
            }
            if let Some(drafted) = drafted {
                below("verify", "row of the drafts", draft.from, drafted.rows)?;
            }
            let parent = draft.parent.map_or(0, |parent| parent + 1);
            let from = if drafted.is_some() { count("verify", "row of the drafts", draft.from)? } else { 0 };
            nodes.push(Node { token: draft.token, parent, from, unused: 0, accept: draft.accept, random });
        }
    }
    at_most("verify", "drafts", nodes.len(), u32::MAX as usize)?;
    Ok((nodes, places))
}
