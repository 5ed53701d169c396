//! How connections get to the agent: by its own kernel programs, or by rules that istio-cni puts
//! into the pods.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use culvert_abi::{Counts, OUTBOUND_PORT, PLAINTEXT_PORT};
use culvert_core::addr::OriginalDst;
use tokio::net::TcpStream;

use super::{
    Capture, CaptureError, Direct, KernelLogs, MapCounts, NetnsCookie, Original, PodListeners,
    PodSpec, sys,
};

/// Cloning copies a pointer.
#[derive(Clone, Debug)]
pub enum Redirection {
    /// The kernel programs capture. Rules of istio-cni may be in a pod too: what they catch first is
    /// served as well.
    Ebpf(Arc<Capture>),
    /// istio-cni's rules alone; nothing of ours is in the kernel.
    Cni,
}

/// Why it is not known where a connection was going; it must be refused.
#[derive(Debug, thiserror::Error)]
pub enum NoOriginalDst {
    #[error("no original destination")]
    Absent,
    #[error("attempted recursive call to ourselves")]
    SelfCall,
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("original destination: {0}")]
    Socket(#[from] io::Error),
}

impl Redirection {
    /// The kernel programs, where they capture.
    pub fn kernel(&self) -> Option<&Capture> {
        match self {
            Redirection::Ebpf(capture) => Some(capture),
            Redirection::Cni => None,
        }
    }

    /// Where a connection that was accepted on the outbound port was going.
    pub fn outbound_dst(&self, accepted: &TcpStream) -> Result<Original, NoOriginalDst> {
        if let Redirection::Ebpf(capture) = self
            && let Some(original) = capture.original_dst(accepted)?
        {
            return Ok(original);
        }
        let local = canonical(accepted.local_addr()?);
        let found = |to| Ok(Original { to: OriginalDst::new(to), elsewhere: None });
        match (translated(accepted), self) {
            // Someone connected to the agent's port by hand.
            (Some(to), Redirection::Cni) if to == local && to.port() == OUTBOUND_PORT => {
                Err(NoOriginalDst::SelfCall)
            }
            (Some(to), _) if to != local => found(to),
            (_, Redirection::Ebpf(_)) => Err(NoOriginalDst::Absent),
            // Delivered without translation, as TPROXY does.
            (_, Redirection::Cni) if local.port() != OUTBOUND_PORT => found(local),
            (_, Redirection::Cni) => Err(NoOriginalDst::Absent),
        }
    }

    /// Whether a connection that was accepted on the outbound port is not the pod's own, but a direct
    /// one to the pod whose verdict was taken back while it was on its way: see [`Direct::flow`].
    pub fn is_retracted(&self, accepted: &TcpStream) -> bool {
        let port = accepted.local_addr().map(|local| local.port());
        matches!((self, port), (Redirection::Ebpf(_), Ok(port)) if port != OUTBOUND_PORT)
    }

    /// Keeps a socket of the agent from being captured by the kernel programs. istio-cni's rules
    /// look at its mark instead.
    pub fn exempt(&self, socket: impl AsFd) -> Result<(), CaptureError> {
        match self {
            Redirection::Ebpf(capture) => capture.exempt(socket),
            Redirection::Cni => Ok(()),
        }
    }

    /// [`Capture::enrol`]. With istio-cni's rules a pod is captured before the agent hears of it.
    pub fn enrol(
        &self,
        netns: BorrowedFd,
        cookie: NetnsCookie,
        spec: &PodSpec,
        listeners: &PodListeners,
    ) -> Result<(), CaptureError> {
        match self {
            Redirection::Ebpf(capture) => capture.enrol(netns, cookie, spec, listeners),
            Redirection::Cni => Ok(()),
        }
    }

    /// [`Capture::withdraw`].
    pub fn withdraw(&self, cookie: NetnsCookie) -> Result<(), CaptureError> {
        match self {
            Redirection::Ebpf(capture) => capture.withdraw(cookie),
            Redirection::Cni => Ok(()),
        }
    }

    /// [`Capture::forget_ended`].
    pub fn forget_ended(&self, cookie: NetnsCookie) -> Result<bool, CaptureError> {
        match self {
            Redirection::Ebpf(capture) => capture.forget_ended(cookie),
            Redirection::Cni => Ok(true),
        }
    }

    /// [`Capture::pods`].
    pub fn pods(&self) -> Vec<NetnsCookie> {
        match self {
            Redirection::Ebpf(capture) => capture.pods(),
            Redirection::Cni => Vec::new(),
        }
    }

    /// [`Capture::programs`].
    pub fn programs(&self) -> Vec<(String, u32)> {
        match self {
            Redirection::Ebpf(capture) => capture.programs(),
            Redirection::Cni => Vec::new(),
        }
    }

    /// [`Capture::counts`].
    pub fn counts(&self) -> MapCounts {
        match self {
            Redirection::Ebpf(capture) => capture.counts(),
            Redirection::Cni => MapCounts::default(),
        }
    }

    /// [`Capture::events`].
    pub fn events(&self) -> Result<Counts, CaptureError> {
        match self {
            Redirection::Ebpf(capture) => capture.events(),
            Redirection::Cni => Ok(Counts::default()),
        }
    }

    /// [`Capture::direct`]; `None` where nothing of ours is in the kernel.
    pub fn direct(&self) -> Option<&Direct> {
        match self {
            Redirection::Ebpf(capture) => Some(capture.direct()),
            Redirection::Cni => None,
        }
    }

    /// [`Capture::logs`].
    pub fn logs(&self) -> Option<KernelLogs> {
        match self {
            Redirection::Ebpf(capture) => capture.logs(),
            Redirection::Cni => None,
        }
    }
}

/// Where a connection that was accepted on the plaintext port was going: the local address, unless
/// a rule has translated it. A port of the agent means that someone connected to it by hand.
pub fn plaintext_dst(accepted: &TcpStream) -> io::Result<SocketAddr> {
    let local = canonical(accepted.local_addr()?);
    if local.port() != PLAINTEXT_PORT {
        return Ok(local);
    }
    Ok(translated(accepted).unwrap_or(local))
}

/// What connection tracking has as the original destination; `None` where it knows nothing.
fn translated(accepted: &TcpStream) -> Option<SocketAddr> {
    sys::original_dst(accepted.as_fd()).ok().map(canonical)
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
