//! The side of the agent that serves, and gives.

use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use super::channel::Channel;
use super::estate::Heirloom;
use super::message::{Fault, Greeting, Message};
use super::{ANSWER_LIMIT, HandoverError, TAKE_LIMIT};

/// How many successors may make themselves ready at a time; further ones are turned away.
const SUCCESSORS: usize = 4;

/// The socket on which successors ask. Its file stays when the agent ends: nobody answers there then,
/// and a successor may have put its own in its place.
#[derive(Debug)]
pub struct Socket(UnixSeqpacketListener);

impl Socket {
    /// Takes the place of the socket that an earlier agent has there, in one step.
    pub fn bind(path: &Path) -> Result<Socket, HandoverError> {
        let failed = |error| HandoverError::Socket { path: path.to_owned(), error };
        if let Some(folder) = path.parent() {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(folder).map_err(failed)?;
        }
        let own = path.with_extension(format!("{}.new", std::process::id()));
        // What an earlier process of this number left there.
        let _ = fs::remove_file(&own);
        let listener = UnixSeqpacketListener::bind(&own).map_err(failed)?;
        let placed = fs::set_permissions(&own, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&own, path));
        if let Err(error) = placed {
            let _ = fs::remove_file(&own);
            return Err(failed(error));
        }
        Ok(Socket(listener))
    }
}

/// What a successor asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    All,
    /// It cannot use what there is.
    LetGo,
}

/// A successor that has made itself ready.
#[derive(Debug)]
pub struct Asked {
    pub wish: Wish,
    pub by: Greeting,
    channel: Channel,
}

/// What is given away.
#[derive(Debug)]
pub struct Estate<'a> {
    /// The locked folder of pins.
    pub pins: BorrowedFd<'a>,
    pub pods: Vec<Heirloom<'a>>,
    /// The listeners of the agent's own servers.
    pub servers: Vec<BorrowedFd<'a>>,
}

impl Asked {
    /// Gives all, and waits until the successor is about to serve.
    pub async fn give(&self, estate: &Estate<'_>) -> Result<(), HandoverError> {
        let channel = &self.channel;
        channel.send(&Message::Pins, &[estate.pins]).await?;
        for Heirloom { told, descriptors } in &estate.pods {
            channel.send(&Message::Pod(told.clone()), descriptors).await?;
        }
        channel.send(&Message::Servers, &estate.servers).await?;
        channel.send(&Message::Whole { pods: estate.pods.len() }, &[]).await?;
        match channel.receive_within(TAKE_LIMIT).await? {
            (Message::Take, _) => Ok(()),
            (other, _) => Err(Fault::Unexpected { wanted: "take", came: other.name() }.into()),
        }
    }

    /// From here on it is the successor's.
    pub async fn yours(&self) -> Result<(), HandoverError> {
        self.channel.send(&Message::Yours, &[]).await
    }

    /// Tells that nothing comes of it.
    pub async fn refuse(self, why: &(dyn std::fmt::Display + Sync)) {
        self.channel.refuse(why).await;
    }
}

/// Talks to successors until nobody takes what they ask for.
pub async fn serve(mut socket: Socket, own: Greeting, asked: mpsc::Sender<Asked>) {
    let mut talks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = socket.0.accept() => match accepted {
                Ok(_) if talks.len() >= SUCCESSORS => {
                    tracing::warn!("too many agents want to take over");
                }
                Ok(connection) => {
                    let (own, asked) = (own.clone(), asked.clone());
                    talks.spawn(async move {
                        if let Err(error) = talk(connection, own, asked).await {
                            tracing::warn!(%error, "an agent that wanted to take over");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an agent that wants to take over");
                    tokio::time::sleep(ANSWER_LIMIT).await;
                }
            },
            Some(_) = talks.join_next() => {}
            () = asked.closed() => return,
        }
    }
}

/// One successor, from its greeting to its wish.
async fn talk(
    connection: UnixSeqpacket,
    own: Greeting,
    asked: mpsc::Sender<Asked>,
) -> Result<(), HandoverError> {
    let channel = Channel::new(connection)?;
    let by = match channel.receive_within(ANSWER_LIMIT).await {
        Ok((Message::Hello(by), _)) => by,
        Ok((other, _)) => {
            let fault = Fault::Unexpected { wanted: "hello", came: other.name() };
            channel.refuse(&fault).await;
            return Err(fault.into());
        }
        // It only looked whether there is somebody.
        Err(HandoverError::Ended) => return Ok(()),
        Err(error) => {
            channel.refuse(&error).await;
            return Err(error);
        }
    };
    let mismatch = own.mismatch(&by);
    channel.send(&Message::Hello(own), &[]).await?;
    tracing::info!(%by, "another agent makes itself ready to take over");
    let wish = match (channel.receive().await, mismatch) {
        (Ok((Message::Give, _)), None) => Wish::All,
        (Ok((Message::LetGo, _)), _) => Wish::LetGo,
        (Ok((other, _)), _) => {
            let fault = Fault::Unexpected { wanted: "a wish that fits", came: other.name() };
            channel.refuse(&fault).await;
            return Err(fault.into());
        }
        (Err(HandoverError::Ended), _) => {
            tracing::info!(%by, "it has ended before it took over");
            return Ok(());
        }
        (Err(error), _) => {
            channel.refuse(&error).await;
            return Err(error);
        }
    };
    // Nobody takes it: this agent ends, and closing tells so.
    let _ = asked.send(Asked { wish, by, channel }).await;
    Ok(())
}
