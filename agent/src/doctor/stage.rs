//! Two pods that exist only for a trial, and accelerated connections between them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use culvert_core::tables::{Backend, Verdict, VerdictId, VerdictKey};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tracing::level_filters::LevelFilter;

use crate::capture::direct::{SocketCookie, since_boot};
use crate::capture::trial::{self, TrialError};
use crate::capture::{
    Acceleration, Capture, CaptureError, CaptureOptions, Direct, Listeners, Netns, NetnsError,
    PodSpec,
};

/// Addresses for documentation (RFC 5737, RFC 3849): the namespaces are linked to nothing else.
const CLIENT: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
const SERVER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2)),
];
/// Longer than any trial.
const HOUR: Duration = Duration::from_secs(3600);
/// How long a new address may be unusable.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// Where the trial's programs go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// A cgroup in which the trying process is.
    pub cgroup: PathBuf,
    /// A folder on a BPF file system that does not exist yet.
    pub pin_path: PathBuf,
}

/// Why there is no stage.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    #[error(transparent)]
    Trial(#[from] TrialError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("connecting two namespaces: {0}")]
    Connect(#[from] io::Error),
    #[error("a connection was not accelerated, though it was to be")]
    Plain,
}

/// Waits this long. A thread that is parked goes on at once if another one, such as a scope's last,
/// has unparked it before; a case would then not try what it is about.
pub(super) fn pause(time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|it| !it.is_zero()) {
        std::thread::park_timeout(left);
    }
}

/// Which addresses a connection uses.
#[derive(Clone, Copy, Debug)]
pub(super) enum Family {
    V4,
    V6,
}

pub(super) struct Stage {
    capture: Capture,
    pub client: Netns,
    pub server: Netns,
    /// What would receive connections that do not go straight.
    _agent: [Listeners; 2],
    verdicts: AtomicU64,
}

/// Both ends of a connection.
pub(super) struct Pair {
    pub client: TcpStream,
    pub server: TcpStream,
    /// The client's socket.
    pub cookie: SocketCookie,
}

impl Stage {
    pub fn set(place: &Place, acceleration: Acceleration) -> Result<Stage, StageError> {
        let (client, server) = trial::pair(&CLIENT, &SERVER)?;
        let options = CaptureOptions {
            cgroup: place.cgroup.clone(),
            pin_path: place.pin_path.clone(),
            node: Netns::current()?.cookie(),
            max_pods: 2,
            max_verdicts: 1024,
            max_direct: 4096,
            acceleration: Some(acceleration),
            log_level: LevelFilter::OFF,
        };
        let capture = Capture::start(&options)?;
        capture.accelerate()?;
        let enrol = |netns: &Netns, addresses: [IpAddr; 2]| -> Result<Listeners, StageError> {
            let listeners = netns.listen()?;
            let spec = PodSpec { addresses: addresses.to_vec(), ..PodSpec::default() };
            capture.enrol(netns.as_fd(), netns.cookie(), &spec, &(&listeners).into())?;
            Ok(listeners)
        };
        let agent = [enrol(&client, CLIENT)?, enrol(&server, SERVER)?];
        capture.direct().admit_until(since_boot() + HOUR)?;
        Ok(Stage { capture, client, server, _agent: agent, verdicts: AtomicU64::new(0) })
    }

    pub fn kernel(&self) -> &Direct {
        self.capture.direct()
    }

    /// Listens in the server's pod, where the client may connect to.
    pub fn listen(&self, family: Family) -> Result<(TcpListener, SocketAddr), StageError> {
        let ip = match family {
            Family::V4 => SERVER[0],
            Family::V6 => SERVER[1],
        };
        let listener = self.server.run(|| TcpListener::bind((ip, 0)))??;
        let to = listener.local_addr()?;
        let netns = self.server.cookie();
        let backends = vec![Backend { to, netns, weight: 1, accelerated: true }];
        let id = VerdictId(self.verdicts.fetch_add(1, Ordering::Relaxed) + 1);
        let verdict = Verdict { id, expires: since_boot() + HOUR, backends, elsewhere: 0 };
        let key = VerdictKey { source: self.client.cookie(), destination: to };
        self.kernel().set_verdict(&key, &verdict)?;
        Ok((listener, to))
    }

    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let began = Instant::now();
        loop {
            match self.client.run(|| TcpStream::connect(to))? {
                // The link has just come up.
                Err(error)
                    if error.kind() == io::ErrorKind::NetworkUnreachable
                        && began.elapsed() < SETTLE_LIMIT => {}
                connected => return connected,
            }
            pause(Duration::from_millis(10));
        }
    }

    /// A connection that is accelerated.
    pub fn pair(&self) -> Result<Pair, StageError> {
        let (listener, to) = self.listen(Family::V4)?;
        let client = self.connect(to)?;
        let (server, _) = listener.accept()?;
        let cookie = SocketCookie(SockRef::from(&client).cookie()?);
        match self.kernel().short(cookie)? {
            Some(_) => Ok(Pair { client, server, cookie }),
            None => Err(StageError::Plain),
        }
    }
}
