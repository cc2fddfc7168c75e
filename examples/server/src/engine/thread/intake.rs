//! A job comes in: its requests are queued, and its ticket is written.

use std::sync::Arc;
use std::time::Instant;

use quayline_engine::{Beams, Refusal, Request, RequestId};
use tokio::sync::mpsc;

use super::super::job::{Job, Ticket, Wait};
use super::super::{STEPS_UNREAD_MAX, tick};
use super::{EngineThread, Live, Open};
use crate::metrics::Timeline;

impl EngineThread {
    /// Queues all requests of a job, or none.
    pub(super) fn submit(&mut self, job: Job) -> Result<Ticket, Refusal> {
        let key = self.ids;
        let now = Instant::now();
        let mut ids = Vec::with_capacity(job.prompts.len());
        for (choice, (prompt, sampling)) in job.prompts.iter().enumerate() {
            let id = RequestId(self.ids);
            let first = choice - choice % job.n.max(1) as usize;
            // A search answers under the ids of all its choices, which follow each other.
            let others = || (1..u64::from(job.n)).map(|place| RequestId(id.0 + place)).collect();
            let search = |length_penalty| Beams { others: others(), length_penalty };
            let request = Request {
                sampling: sampling.clone(),
                grammar: match &job.grammar {
                    Wait::Ready(grammar) => Some(grammar.clone()),
                    Wait::Free | Wait::Compiling => None,
                },
                priority: job.turn.priority,
                tenant: job.turn.tenant_id(),
                targets: job.turn.targets,
                expected_new_tokens: job.turn.expected_new_tokens,
                cache_salt: job.cache_salt.clone(),
                sample_of: ids.get(first).copied(),
                beams: job.beams.map(search),
                hands_over: job.hands_over.is_some(),
                remote_tokens: match job.pulls {
                    Some(_) => u32::try_from(prompt.len()).unwrap_or(u32::MAX),
                    None => 0,
                },
                arrival: tick(self.origin, now),
                ..Request::new(id, Arc::clone(prompt))
            };
            let is_part = job.beams.is_some() && choice > first;
            let added = match job.grammar {
                _ if is_part => Ok(()),
                Wait::Compiling => self.engine.add_before_grammar(request),
                Wait::Free | Wait::Ready(_) => self.engine.add(request),
            };
            if let Err(refusal) = added {
                for id in ids {
                    self.engine.cancel(id);
                }
                if refusal.is_temporary() {
                    self.metrics.refused();
                }
                return Err(refusal);
            }
            self.ids += 1;
            ids.push(id);
        }
        Ok(self.open(key, job, ids))
    }

    fn open(&mut self, key: u64, mut job: Job, ids: Vec<RequestId>) -> Ticket {
        // Whoever hands over or pulls is alone in its job.
        self.kept.extend(job.hands_over.take().zip(ids.first().copied()));
        let (sender, parts) = mpsc::channel(STEPS_UNREAD_MAX);
        for ((choice, id), (prompt, sampling)) in (0..).zip(&ids).zip(&job.prompts) {
            let timeline = Timeline {
                arrived: job.arrived,
                started: None,
                first: None,
                last: job.arrived,
                prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
                cached_tokens: 0,
                loaded_tokens: 0,
                preemptions: 0,
                output_tokens: 0,
                max_tokens: sampling.max_tokens,
                n: job.n,
            };
            self.requests.insert(*id, Live { job: key, choice, timeline, pulls: job.pulls.take() });
        }
        let unfinished = ids.len();
        let open = Open {
            name: job.name,
            turn: job.turn,
            sender,
            ids: ids.clone(),
            parts: Vec::new(),
            unfinished,
            longest: 0,
        };
        self.jobs.insert(key, open);
        Ticket { parts, ids, unfinished, commands: self.commands.clone() }
    }
}
