//! Calls of the engine's methods on the control slot. A call is made once, however often it is asked for: whoever asks
//! may be a follower that was started again between a call and its answer, and a lockstep engine that is paused twice
//! waits alone in a barrier that the others have passed.

use std::collections::{BTreeMap, VecDeque};

use uuid::Uuid;

use crate::driver::handles::{Call, CallResult, ReplyTo};

/// Answers that are kept for somebody who asks again.
const KEPT: usize = 16;

#[derive(Debug)]
struct Waiting {
    key: Uuid,
    replies: Vec<ReplyTo>,
}

/// The calls of a rank.
#[derive(Debug, Default)]
pub(super) struct Calls {
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    answered: VecDeque<(Uuid, CallResult)>,
}

impl Calls {
    /// Takes a call. Gives the token under which it is to be made; none if it was made before.
    pub(super) fn take(&mut self, key: Uuid, reply: ReplyTo) -> Option<u64> {
        if let Some((_, result)) = self.answered.iter().find(|(answered, _)| *answered == key) {
            reply.send::<Call>(result.clone());
            return None;
        }
        if let Some(waiting) = self.waiting.values_mut().find(|waiting| waiting.key == key) {
            // Those before have gone, as a rule.
            waiting.replies.retain(|reply| !reply.is_closed());
            waiting.replies.push(reply);
            return None;
        }
        self.next += 1;
        self.waiting.insert(self.next, Waiting { key, replies: vec![reply] });
        Some(self.next)
    }

    /// A call is answered.
    pub(super) fn answer(&mut self, token: u64, result: &CallResult) {
        let Some(Waiting { key, replies }) = self.waiting.remove(&token) else { return };
        for reply in replies {
            reply.send::<Call>(result.clone());
        }
        if self.answered.len() == KEPT {
            self.answered.pop_front();
        }
        self.answered.push_back((key, result.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::handles::{Answered, HandleError, decode};

    fn value(answer: &mut Answered) -> rmpv::Value {
        decode(&answer.try_recv().unwrap().unwrap()).unwrap()
    }

    #[test]
    fn a_call_is_made_once_and_answered_to_everybody_who_asks_for_it() {
        let mut calls = Calls::default();
        let (key, other) = (Uuid::new_v4(), Uuid::new_v4());
        let (first, first_answer) = ReplyTo::channel();
        let token = calls.take(key, first).unwrap();
        // Who asked is gone, and its successor asks again.
        drop(first_answer);
        let (second, mut second_answer) = ReplyTo::channel();
        assert_eq!(calls.take(key, second), None);
        let (different, mut different_answer) = ReplyTo::channel();
        let different = calls.take(other, different).unwrap();
        assert_ne!(different, token);
        calls.answer(token, &Ok(rmpv::Value::from(7)));
        assert_eq!(value(&mut second_answer), rmpv::Value::from(7));
        assert!(different_answer.try_recv().is_err());
        let (late, mut late_answer) = ReplyTo::channel();
        assert_eq!(calls.take(key, late), None);
        assert_eq!(value(&mut late_answer), rmpv::Value::from(7));
        calls.answer(different, &Err(HandleError::failed("no")));
        assert!(different_answer.try_recv().unwrap().is_err());
    }

    #[test]
    fn only_the_last_answers_are_kept() {
        let mut calls = Calls::default();
        for _ in 0..3 * KEPT {
            let (reply, _) = ReplyTo::channel();
            let token = calls.take(Uuid::new_v4(), reply).unwrap();
            calls.answer(token, &Ok(rmpv::Value::Nil));
        }
        assert_eq!((calls.answered.len(), calls.waiting.len()), (KEPT, 0));
    }
}
