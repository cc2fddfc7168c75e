//! Policies side by side: what each finds in caches of several sizes.

use std::fmt;

use quayline_kv_cache::Error;
use quayline_kv_cache::evict::PolicyName;

use crate::belady;
use crate::prompts::Prompts;
use crate::replay::{Share, replay};

/// What a policy finds, by size of the cache.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Whose it is.
    pub name: String,
    /// One for each size.
    pub shares: Vec<Share>,
}

/// A comparison of policies over the same sizes and the same trace.
#[derive(Clone, Debug)]
pub struct Curves {
    /// Blocks that the caches keep.
    pub sizes: Vec<u32>,
    /// One for each policy, then the optimum.
    pub curves: Vec<Curve>,
    /// What a cache finds that never evicts.
    pub infinite: Share,
}

impl Curves {
    /// Replays the prompts once for each policy and size.
    ///
    /// # Errors
    /// When there cannot be a cache of one of these sizes.
    pub fn of(prompts: &Prompts, sizes: &[u32], policies: &[PolicyName]) -> Result<Curves, Error> {
        let mut curves = Vec::new();
        for &policy in policies {
            let shares = sizes.iter().map(|&size| replay(prompts, size, policy)).collect::<Result<_, _>>()?;
            curves.push(Curve { name: policy.to_string(), shares });
        }
        let shares = sizes.iter().map(|&size| belady::optimum(prompts, size)).collect();
        curves.push(Curve { name: "optimum".to_owned(), shares });
        let infinite = belady::optimum(prompts, prompts.distinct_blocks());
        Ok(Curves { sizes: sizes.to_vec(), curves, infinite })
    }

    /// The tables of a report: shares of blocks, of tokens and of work, and what the policies find beyond LRU.
    pub fn tables(&self) -> String {
        let [blocks, tokens, work] = [
            Table { curves: self, title: "hit share of blocks", value: Share::of_blocks },
            Table { curves: self, title: "hit share of tokens", value: Share::of_tokens },
            Table { curves: self, title: "share of prefill work saved", value: Share::of_work },
        ];
        format!("{blocks}\n{tokens}\n{work}\n{}", self.gains().unwrap_or_default())
    }

    /// What each policy finds beyond LRU, and how much that is of what the optimum finds beyond it.
    fn gains(&self) -> Option<String> {
        let lru = self.curves.iter().find(|curve| curve.name == PolicyName::Lru.as_str())?;
        let optimum = self.curves.last()?;
        let others: Vec<&Curve> =
            self.curves.iter().filter(|curve| ![&lru.name, &optimum.name].contains(&&curve.name)).collect();
        if others.is_empty() {
            return None;
        }
        let mut text = String::from(
            "blocks found beyond lru, and of those that the optimum finds beyond it\n    blocks",
        );
        others.iter().for_each(|curve| text.push_str(&format!("  {:>17}", curve.name)));
        for (index, size) in self.sizes.iter().enumerate() {
            text.push_str(&format!("\n{size:>10}"));
            let [lru, best] = [lru, optimum].map(|curve| curve.shares[index].of_blocks());
            for curve in &others {
                let gain = curve.shares[index].of_blocks() - lru;
                let of_gap = if best > lru { 100.0 * gain / (best - lru) } else { 0.0 };
                text.push_str(&format!("  {gain:>+8.4} {of_gap:>6.1} %"));
            }
        }
        text.push('\n');
        Some(text)
    }
}

/// One number of every policy and size.
struct Table<'a> {
    curves: &'a Curves,
    title: &'a str,
    value: fn(&Share) -> f64,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Table { curves: Curves { sizes, curves, infinite }, title, value } = self;
        writeln!(f, "{title}; {:.4} in a cache that never evicts", value(infinite))?;
        write!(f, "{:>10}", "blocks")?;
        for curve in curves {
            write!(f, "  {:>10}", curve.name)?;
        }
        for (index, size) in sizes.iter().enumerate() {
            write!(f, "\n{size:>10}")?;
            for curve in curves {
                write!(f, "  {:>10.4}", value(&curve.shares[index]))?;
            }
        }
        writeln!(f)
    }
}
