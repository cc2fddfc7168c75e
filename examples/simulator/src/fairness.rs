//! Who got how much while all of them wanted more.
//!
//! A tenant that asks for little gets little, which is nothing unfair. So only those are compared that had
//! requests waiting through a whole [`WINDOW_TICKS`], by what they were served in it, in token costs: 1 for a
//! token of a prompt, 2 for a generated one, as in Sheng et al., *Fairness in Serving Large Language Models*,
//! OSDI 2024.

/// How long a comparison lasts, in nanoseconds.
pub const WINDOW_TICKS: u64 = 10_000_000_000;

/// What a generated token costs, when one of a prompt costs 1.
pub const OUTPUT_COST: f64 = 2.0;

/// The books of a run.
#[derive(Clone, Debug)]
pub struct Fairness {
    window_start: u64,
    /// By tenant: what it was served in this window, and whether it had requests waiting at every step of it.
    served: Vec<f64>,
    waits: Vec<bool>,
    /// By tenant: what it was served in the windows that counted, and what an equal share of them was.
    got: Vec<f64>,
    due: Vec<f64>,
    /// Jain's index of each window times what was served in it, and this alone.
    jain: f64,
    weight: f64,
}

/// What the books say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Jain's index over the tenants that waited, averaged over the windows: 1 when all are served alike, `1 /
    /// n` when one of `n` gets all. `None` when there never were two that waited.
    pub jain: Option<f64>,
    /// The tenant that was served least of its equal share, and how much of it.
    pub worst: Option<(u32, f64)>,
}

impl Fairness {
    /// Empty books of so many tenants.
    pub fn new(tenants: usize) -> Fairness {
        Fairness {
            window_start: 0,
            served: vec![0.0; tenants],
            waits: vec![true; tenants],
            got: vec![0.0; tenants],
            due: vec![0.0; tenants],
            jain: 0.0,
            weight: 0.0,
        }
    }

    /// A tenant was served.
    pub fn serve(&mut self, tenant: u32, cost: f64) {
        self.served[tenant as usize] += cost;
    }

    /// A step was planned; `waiting` is how many requests of each tenant it left out.
    pub fn step(&mut self, now: u64, waiting: &[u32]) {
        for (waits, &waiting) in self.waits.iter_mut().zip(waiting) {
            *waits &= waiting > 0;
        }
        if now >= self.window_start + WINDOW_TICKS {
            self.close();
            self.window_start = now;
        }
    }

    fn close(&mut self) {
        let waited =
            || self.waits.iter().zip(&self.served).filter(|(waits, _)| **waits).map(|(_, &served)| served);
        let (tenants, total) = (waited().count(), waited().sum::<f64>());
        if tenants > 1 && total > 0.0 {
            let squares: f64 = waited().map(|served| served * served).sum();
            self.jain += total * total * total / (tenants as f64 * squares);
            self.weight += total;
            for tenant in (0..self.served.len()).filter(|&tenant| self.waits[tenant]) {
                self.got[tenant] += self.served[tenant];
                self.due[tenant] += total / tenants as f64;
            }
        }
        self.served.fill(0.0);
        self.waits.fill(true);
    }

    /// What the windows that have ended say.
    pub fn verdict(&self) -> Verdict {
        let shares = (0u32..).zip(self.got.iter().zip(&self.due)).filter(|(_, (_, due))| **due > 0.0);
        Verdict {
            jain: (self.weight > 0.0).then(|| self.jain / self.weight),
            worst: shares.map(|(tenant, (got, due))| (tenant, got / due)).min_by(|a, b| a.1.total_cmp(&b.1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tenants_that_wait_throughout_are_compared() {
        let mut fairness = Fairness::new(3);
        for (tenant, cost) in [(0, 30.0), (1, 10.0), (2, 1.0)] {
            fairness.serve(tenant, cost);
        }
        fairness.step(1, &[5, 1, 1]);
        fairness.step(WINDOW_TICKS, &[5, 1, 0]);
        // (30 + 10)² / (2 * (30² + 10²))
        assert_eq!(fairness.verdict(), Verdict { jain: Some(0.8), worst: Some((1, 0.5)) });
        fairness.step(2 * WINDOW_TICKS, &[1, 0, 0]);
        assert_eq!(fairness.verdict(), Verdict { jain: Some(0.8), worst: Some((1, 0.5)) });
        assert_eq!(Fairness::new(2).verdict(), Verdict::default());
    }
}
