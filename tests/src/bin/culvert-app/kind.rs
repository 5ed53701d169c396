//! What went wrong with a connection, in one word for programs and a sentence for people.

use std::io;

use serde::Serialize;

/// How a call or a stream failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Nobody listens.
    Refused,
    /// The connection was broken.
    Reset,
    /// A clean end where there should have been more.
    Cut,
    /// Nothing happened for too long.
    Timeout,
    /// The name has no address.
    Name,
    /// The answer is not what it should be.
    Wrong,
    /// Anything else.
    Other,
}

/// A failure, as it is told.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    pub kind: Kind,
    pub error: String,
}

impl Failure {
    pub fn new(kind: Kind, error: impl ToString) -> Self {
        Self { kind, error: error.to_string() }
    }

    pub fn wrong(error: impl ToString) -> Self {
        Self::new(Kind::Wrong, error)
    }

    pub fn timeout() -> Self {
        Self::new(Kind::Timeout, "no answer in time")
    }

    /// What an HTTP exchange failed with: the error of its connection, if there was one.
    pub fn http(error: &hyper::Error) -> Self {
        let kind = if error.is_incomplete_message() { Kind::Cut } else { Kind::Other };
        Self::of_connection(error).unwrap_or_else(|| Self::new(kind, error))
    }

    /// The error of the connection that an HTTP exchange failed with.
    pub fn of_connection(error: &hyper::Error) -> Option<Self> {
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            if let Some(io) = cause.downcast_ref::<io::Error>() {
                return Some(Self::from_io(io));
            }
            source = cause.source();
        }
        None
    }

    fn from_io(error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::ConnectionRefused => Kind::Refused,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted => Kind::Reset,
            io::ErrorKind::UnexpectedEof => Kind::Cut,
            io::ErrorKind::TimedOut => Kind::Timeout,
            _ => Kind::Other,
        };
        Self::new(kind, error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::from_io(&error)
    }
}
