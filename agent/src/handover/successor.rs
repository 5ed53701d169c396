//! The side of the agent that begins, and takes.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::Path;

use tokio_seqpacket::UnixSeqpacket;

use super::channel::Channel;
use super::estate::{GivenPod, GivenPods};
use super::message::{Fault, Greeting, Message, Mismatch};
use super::{ANSWER_LIMIT, HandoverError};

/// A running agent that can be asked to hand over.
#[derive(Debug)]
pub struct Predecessor {
    channel: Channel,
    pub greeting: Greeting,
    /// Why it can only be asked to let go.
    pub mismatch: Option<Mismatch>,
}

/// Greets the agent that listens at `path`; `None` when there is none.
pub async fn find(path: &Path, own: &Greeting) -> Result<Option<Predecessor>, HandoverError> {
    let socket = match UnixSeqpacket::connect(path).await {
        Ok(socket) => socket,
        Err(error) if is_nobody(&error) => return Ok(None),
        Err(error) => return Err(HandoverError::Socket { path: path.to_owned(), error }),
    };
    let channel = Channel::new(socket)?;
    let greeted = async {
        channel.send(&Message::Hello(own.clone()), &[]).await?;
        channel.receive_within(ANSWER_LIMIT).await
    };
    match greeted.await {
        Ok((Message::Hello(greeting), _)) => {
            let mismatch = greeting.mismatch(own);
            Ok(Some(Predecessor { channel, greeting, mismatch }))
        }
        Ok((other, _)) => Err(Fault::Unexpected { wanted: "hello", came: other.name() }.into()),
        Err(HandoverError::Ended) => Ok(None),
        Err(error) => Err(error),
    }
}

/// There is no socket, or a process that has ended left it.
fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

impl Predecessor {
    /// Ready when it has ended, or has nothing more to say.
    pub async fn ended(&self) {
        // It has nothing to say before it is asked.
        let _ = self.channel.receive().await;
    }

    /// Asks for all it has; it goes on serving. An agent that ends meanwhile leaves what it gave.
    pub async fn ask(self) -> Result<Bequest, HandoverError> {
        self.channel.send(&Message::Give, &[]).await?;
        let mut given = GivenPods::new(self.greeting.max_pods);
        let channel = loop {
            match self.channel.receive_within(ANSWER_LIMIT).await {
                Ok((message, descriptors)) => match given.hear(message, descriptors) {
                    Ok(false) => {}
                    Ok(true) => break Some(self.channel),
                    Err(fault) => {
                        self.channel.refuse(&fault).await;
                        return Err(fault.into());
                    }
                },
                Err(HandoverError::Ended) => break None,
                Err(error) => return Err(error),
            }
        };
        let GivenPods { pins, pods, servers, .. } = given;
        Ok(Bequest { pins, pods, servers, from: self.greeting, channel })
    }

    /// Asks it to stop serving, and waits until it has heard that.
    pub async fn ask_to_let_go(self) -> Result<(), HandoverError> {
        self.channel.send(&Message::LetGo, &[]).await?;
        match self.channel.receive_within(ANSWER_LIMIT).await {
            Err(HandoverError::Ended) => Ok(()),
            Err(error) => Err(error),
            Ok((other, _)) => {
                Err(Fault::Unexpected { wanted: "an end", came: other.name() }.into())
            }
        }
    }
}

/// What was given, so far on loan.
#[derive(Debug)]
pub struct Bequest {
    /// The folder of pins, locked by both agents as one; `None` when the other one ended before.
    pub pins: Option<OwnedFd>,
    pub pods: Vec<GivenPod>,
    pub servers: Vec<TcpListener>,
    pub from: Greeting,
    /// `None` when the other agent has ended.
    channel: Option<Channel>,
}

impl Bequest {
    /// Makes it the own. When this answers, the other agent serves no more.
    pub async fn take(&mut self) -> Result<(), HandoverError> {
        let Some(channel) = self.channel.take() else { return Ok(()) };
        match channel.send(&Message::Take, &[]).await {
            // Whether it has died or given up shows in what it said last.
            Ok(()) | Err(HandoverError::Ended) => {}
            Err(error) => return Err(error),
        }
        match channel.receive_within(ANSWER_LIMIT).await {
            Ok((Message::Yours, _)) | Err(HandoverError::Ended) => Ok(()),
            Ok((other, _)) => Err(Fault::Unexpected { wanted: "yours", came: other.name() }.into()),
            Err(error) => Err(error),
        }
    }

    /// Tells the other agent that nothing comes of it.
    pub async fn refuse(mut self, why: &(dyn std::fmt::Display + Sync)) {
        if let Some(channel) = self.channel.take() {
            channel.refuse(why).await;
        }
    }
}
