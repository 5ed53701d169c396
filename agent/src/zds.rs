//! The pods of this node as istio-cni tells them: the client of its socket (`istio.workload.zds`).
//!
//! One packet is one message. istio-cni asks, and waits up to 5 s for each answer; without one it
//! goes on, and would take a late answer for that of its next request. So an answer comes in time, or
//! the connection ends. What is asked for is carried out by whoever takes the [`Request`]s.
//!
//! A message that istio-cni should never send is answered with the reason and ends the connection;
//! pods go on being served, and the next connection's snapshot sets right what is wrong. The peer
//! program ends itself in some of these cases, which cuts every connection of the node.

mod protocol;

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_seqpacket::UnixSeqpacket;

pub use protocol::{Conversation, Fault, Loss, Order, PodInfo};

use crate::packet::{Packet, PacketError};

/// The longest message of the protocol.
const MAX_BYTES: usize = 1024;
/// The first pause before another attempt to connect; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// How long an order may take. istio-cni waits one second longer for the answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(4);
/// How long a packet may take to be sent.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// An order of istio-cni, and where to say whether it was carried out, or why not.
#[derive(Debug)]
pub struct Request {
    pub order: Order,
    pub answer: oneshot::Sender<Result<(), String>>,
}

/// Why a connection to istio-cni ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("cannot connect to istio-cni: {0}")]
    Connect(io::Error),
    #[error("istio-cni has closed the connection")]
    Closed,
    #[error("the connection to istio-cni broke: {0}")]
    Broken(io::Error),
    #[error("istio-cni broke the protocol: {0}")]
    Fault(#[from] Fault),
    #[error("istio-cni's request took longer than {} s", ANSWER_LIMIT.as_secs())]
    TooSlow,
    /// Nobody takes orders any more: the agent ends.
    #[error("the agent ends")]
    Ended,
}

impl End {
    /// `None` when the agent ends.
    fn loss(&self) -> Option<Loss> {
        Some(match self {
            End::Connect(_) => Loss::Unreachable,
            End::Closed => Loss::Closed,
            End::Broken(_) => Loss::Broken,
            End::Fault(_) => Loss::Fault,
            End::TooSlow => Loss::TooSlow,
            End::Ended => return None,
        })
    }
}

/// Follows istio-cni until nobody takes its orders any more.
///
/// It is not contacted before `synced` is ready: a pod whose workload cannot be known yet is better
/// not acknowledged.
pub async fn run(path: &Path, synced: impl Future<Output = ()>, orders: mpsc::Sender<Request>) {
    tokio::select! {
        () = synced => {}
        () = orders.closed() => return,
    }
    let mut pause = FIRST_PAUSE;
    let mut told = String::new();
    loop {
        let mut session = Session { orders: &orders, answered: 0 };
        let end = tokio::select! {
            end = session.hold(path) => end,
            () = orders.closed() => return,
        };
        if session.answered > 0 {
            (pause, told) = (FIRST_PAUSE, String::new());
        }
        let text = end.to_string();
        let Some(loss) = end.loss() else { return };
        match loss {
            // Said once for as long as it stays so.
            Loss::Unreachable if text == told => {}
            Loss::Unreachable | Loss::Closed => tracing::info!(path = %path.display(), "{text}"),
            Loss::Broken | Loss::Fault | Loss::TooSlow => {
                tracing::error!(path = %path.display(), "{text}");
            }
        }
        told = text;
        if let Err(End::Ended) = session.carry_out(Order::Lost(loss)).await {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

struct Session<'a> {
    orders: &'a mpsc::Sender<Request>,
    /// How many requests were answered without a fault.
    answered: u64,
}

impl Session<'_> {
    /// One connection, from its begin to its end.
    async fn hold(&mut self, path: &Path) -> End {
        let socket = match UnixSeqpacket::connect(path).await {
            Ok(socket) => socket,
            Err(error) => return End::Connect(error),
        };
        match self.converse(&socket).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn converse(&mut self, socket: &UnixSeqpacket) -> Result<std::convert::Infallible, End> {
        send(socket, &protocol::hello()).await?;
        tracing::info!("connected to istio-cni");
        let mut conversation = Conversation::default();
        loop {
            let order = match Packet::receive(socket, MAX_BYTES).await {
                Ok(packet) => conversation.hear(packet),
                Err(PacketError::Cut) => Err(Fault::Truncated),
                Err(PacketError::Closed) => return Err(End::Closed),
                Err(PacketError::Io(error)) => return Err(End::Broken(error)),
            };
            let order = match order {
                Ok(order) => order,
                Err(fault) => {
                    send(socket, &protocol::failure(&fault.to_string())).await?;
                    return Err(fault.into());
                }
            };
            let done = match order {
                Some(order) => self.carry_out(order).await?,
                None => Ok(()),
            };
            let answer = match done {
                Ok(()) => protocol::success(),
                Err(why) => protocol::failure(&format!("failure to start proxy : {why}")),
            };
            send(socket, &answer).await?;
            self.answered += 1;
        }
    }

    async fn carry_out(&self, order: Order) -> Result<Result<(), String>, End> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.orders.send(Request { order, answer }).await.map_err(|_| End::Ended)?;
            answered.await.map_err(|_| End::Ended)
        };
        timeout(ANSWER_LIMIT, asked).await.unwrap_or(Err(End::TooSlow))
    }
}

async fn send(socket: &UnixSeqpacket, message: &[u8]) -> Result<(), End> {
    match timeout(SEND_LIMIT, socket.send(message)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(End::Broken(error)),
        Err(_) => Err(End::Broken(io::ErrorKind::TimedOut.into())),
    }
}

#[cfg(test)]
mod tests;
