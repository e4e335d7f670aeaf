//! How a task is asked for something: in the same way whether it runs in this process or behind a link.
//!
//! A command is a type of its own that implements [`Ask`] and can be serialised as it is. A [`Handle`] puts it into
//! the enum of its task's commands and that into an [`Envelope`]. Its answer comes back encoded, so that who passes
//! a command on need not know it.

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::HandleError;

/// Until a command that sets no limit of its own must be answered, over all links that it crosses.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Commands waiting for one task.
const QUEUE: usize = 1024;

/// What a link may do with a command when its connection, or the process at the other end, comes and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Doing it again changes nothing: it waits for a connection, is sent again after a lost one, and to the
    /// successor of a process that died.
    Repeat,
    /// As `Repeat`, but about something that dies with the process, and then fails.
    Life,
    /// As `Repeat`, but to end something that dies with the process, and is done then.
    End,
    /// As `End`. A newer one takes the place of those that wait for a connection.
    Latest,
    /// Sent once: it fails while there is no connection, and when the connection is lost before its answer.
    Once,
}

/// A command.
pub trait Ask: Serialize + DeserializeOwned + Send + 'static {
    /// What the task says to it.
    type Answer: Serialize + DeserializeOwned + Send + 'static;
    /// What is asked for, in errors and logs.
    const NAME: &'static str;

    /// See [`Delivery`].
    fn delivery(&self) -> Delivery {
        Delivery::Repeat
    }

    /// Longest useful wait for the answer.
    fn limit(&self) -> Duration {
        ANSWER_LIMIT
    }
}

/// What the way of a command depends on.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// [`Ask::NAME`].
    pub name: &'static str,
    /// [`Ask::delivery`].
    pub delivery: Delivery,
    /// [`Ask::limit`].
    pub limit: Duration,
}

impl About {
    /// Of one command.
    pub fn of<A: Ask>(ask: &A) -> Self {
        Self { name: A::NAME, delivery: ask.delivery(), limit: ask.limit() }
    }
}

/// Defines the commands of a task: an enum of them, and how each is answered.
macro_rules! asks {
    (
        $(#[$meta:meta])* $task:ident {
            $($ask:ident -> $answer:ty, $name:literal $(, $delivery:ident $(, $limit:expr)?)?;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
        pub enum $task {
            $(#[doc = concat!("See [`", stringify!($ask), "`].")] $ask($ask),)*
        }

        impl $task {
            /// What its way depends on.
            pub fn about(&self) -> $crate::driver::handles::About {
                match self {
                    $(Self::$ask(ask) => $crate::driver::handles::About::of(ask),)*
                }
            }
        }

        $(
            impl From<$ask> for $task {
                fn from(ask: $ask) -> Self {
                    Self::$ask(ask)
                }
            }

            impl $crate::driver::handles::Ask for $ask {
                type Answer = $answer;
                const NAME: &'static str = $name;
                $(
                    fn delivery(&self) -> $crate::driver::handles::Delivery {
                        $crate::driver::handles::Delivery::$delivery
                    }
                    $(
                        fn limit(&self) -> std::time::Duration {
                            let limit: fn(&Self) -> std::time::Duration = $limit;
                            limit(self)
                        }
                    )?
                )?
            }
        )*
    };
}
pub(super) use asks;

/// The way back of an answer. Dropped without one, the asker hears that the task has ended.
#[derive(Debug)]
pub struct ReplyTo(Option<oneshot::Sender<Result<Bytes, HandleError>>>);

/// Where an answer comes in, encoded.
pub type Answered = oneshot::Receiver<Result<Bytes, HandleError>>;

impl ReplyTo {
    /// For an asker that does not want to know.
    pub const NOWHERE: Self = Self(None);

    /// A way back and its end.
    pub fn channel() -> (Self, Answered) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(sender)), receiver)
    }

    /// Answers a command of this type.
    pub fn send<A: Ask>(self, result: Result<A::Answer, HandleError>) {
        let result = result.and_then(|answer| {
            encode(&answer).map_err(|error| HandleError::failed(format!("{}: answer: {error}", A::NAME)))
        });
        self.forward(result);
    }

    /// Passes an encoded answer on.
    pub fn forward(self, result: Result<Bytes, HandleError>) {
        if let Some(sender) = self.0 {
            // An asker that has gone does not want to know.
            let _ = sender.send(result);
        }
    }

    /// Whether the asker has given up.
    pub fn is_closed(&self) -> bool {
        self.0.as_ref().is_some_and(oneshot::Sender::is_closed)
    }
}

/// A command on its way.
#[derive(Debug)]
pub struct Envelope<C> {
    /// What is asked for.
    pub ask: C,
    /// For how long the asker waits.
    pub limit: Duration,
    /// Where the answer goes.
    pub reply: ReplyTo,
}

impl<C> Envelope<C> {
    /// The same for a task that passes it on.
    pub fn map<D>(self, wrap: impl FnOnce(C) -> D) -> Envelope<D> {
        Envelope { ask: wrap(self.ask), limit: self.limit, reply: self.reply }
    }
}

/// A task that can be asked for `C`. Cheap to clone.
#[derive(Debug)]
pub struct Handle<C> {
    queue: mpsc::Sender<Envelope<C>>,
    task: &'static str,
}

impl<C> Clone for Handle<C> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), task: self.task }
    }
}

/// A handle and its task's end of the queue. `task` names the task in errors.
pub fn queue<C>(task: &'static str) -> (Handle<C>, mpsc::Receiver<Envelope<C>>) {
    queue_of(task, QUEUE)
}

/// A queue with room for so many.
pub(crate) fn queue_of<C>(task: &'static str, size: usize) -> (Handle<C>, mpsc::Receiver<Envelope<C>>) {
    let (queue, inbox) = mpsc::channel(size);
    (Handle { queue, task }, inbox)
}

impl<C> Handle<C> {
    /// Asks, and waits for the answer as long as it is useful.
    ///
    /// # Errors
    /// The task has ended, cannot do it, or does not answer in time.
    #[cfg(any(test, feature = "test-support"))]
    pub async fn ask<A: Ask>(&self, ask: A) -> Result<A::Answer, HandleError>
    where
        C: From<A>,
    {
        self.ask_within(ask.limit(), ask).await
    }

    /// Asks, and waits for the answer at most for `limit`.
    ///
    /// # Errors
    /// As [`Handle::ask`].
    pub async fn ask_within<A: Ask>(&self, limit: Duration, ask: A) -> Result<A::Answer, HandleError>
    where
        C: From<A>,
    {
        let (reply, answered) = ReplyTo::channel();
        let exchange = async {
            self.send(Envelope { ask: ask.into(), limit, reply }).await?;
            answer::<A>(self.task, answered).await
        };
        match timeout(limit, exchange).await {
            Ok(result) => result,
            Err(_) => Err(HandleError::Deadline { what: A::NAME.to_owned(), limit }),
        }
    }

    /// Asks for something whose answer does not matter.
    ///
    /// # Errors
    /// The task has ended.
    pub async fn tell<A: Ask>(&self, ask: A) -> Result<(), HandleError>
    where
        C: From<A>,
    {
        self.send(Envelope { limit: ask.limit(), ask: ask.into(), reply: ReplyTo::NOWHERE }).await
    }

    async fn send(&self, envelope: Envelope<C>) -> Result<(), HandleError> {
        self.queue.send(envelope).await.map_err(|_| HandleError::Gone { task: self.task })
    }

    /// Hands an envelope on if there is room.
    ///
    /// # Errors
    /// There is none, or the task has ended; the envelope comes back.
    pub fn offer(&self, envelope: Envelope<C>) -> Result<(), (Envelope<C>, HandleError)> {
        self.queue.try_send(envelope).map_err(|error| match error {
            TrySendError::Full(envelope) => {
                let error = format!("the {} task: {QUEUE} commands wait already", self.task);
                (envelope, HandleError::failed(error))
            }
            TrySendError::Closed(envelope) => (envelope, HandleError::Gone { task: self.task }),
        })
    }

    /// Room for one command, if there is some.
    ///
    /// # Errors
    /// There is none, or the task has ended.
    pub fn reserve(&self) -> Result<mpsc::Permit<'_, Envelope<C>>, TrySendError<()>> {
        self.queue.try_reserve()
    }
}

/// Waits for an answer and reads it.
///
/// # Errors
/// What the task says, or that it has ended.
pub async fn answer<A: Ask>(task: &'static str, answered: Answered) -> Result<A::Answer, HandleError> {
    let answer = answered.await.map_err(|_| HandleError::Gone { task })??;
    decode(&answer).map_err(|error| HandleError::failed(format!("{}: answer: {error}", A::NAME)))
}

/// As all messages between processes are encoded: msgpack, structures with the names of their fields.
///
/// # Errors
/// It cannot be encoded.
pub fn encode(value: &impl Serialize) -> Result<Bytes, String> {
    rmp_serde::to_vec_named(value).map(Bytes::from).map_err(|error| error.to_string())
}

/// Reads what [`encode`] wrote, or what somebody else sent: nothing is nested or allocated without bound.
///
/// # Errors
/// It is something else.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    crate::msgpack::decode(bytes).map_err(|error| error.to_string())
}
