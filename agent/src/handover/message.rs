//! What agents say to each other, and whether they fit together.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Version of everything that is said, but `hello`, `refused` and `let_go`: these keep their meaning
/// for good, so that any two agents can tell that they do not fit together.
pub const PROTOCOL: u32 = 1;

/// One packet. Unknown fields are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum Message {
    /// The first message of either side.
    Hello(Greeting),
    /// The last message of either side.
    Refused { why: String },
    /// Give me all you have.
    Give,
    /// Stop serving, and free the pins.
    LetGo,
    /// With the locked folder of pins.
    Pins,
    /// With the descriptors of a pod.
    Pod(PodTold),
    /// With the listeners of the agent's own servers.
    Servers,
    /// That was all.
    Whole { pods: usize },
    /// I have it, and am about to serve.
    Take,
    /// I serve no more.
    Yours,
}

impl Message {
    pub fn read(packet: &[u8]) -> Result<Message, Fault> {
        serde_json::from_slice(packet).map_err(|error| Fault::Unreadable(error.to_string()))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        // These types hold nothing that JSON cannot.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// As the log names it.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "hello",
            Message::Refused { .. } => "refused",
            Message::Give => "give",
            Message::LetGo => "let_go",
            Message::Pins => "pins",
            Message::Pod(_) => "pod",
            Message::Servers => "servers",
            Message::Whole { .. } => "whole",
            Message::Take => "take",
            Message::Yours => "yours",
        }
    }
}

/// What an agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`PROTOCOL`] of its build.
    pub protocol: u32,
    /// `ABI_VERSION` of its build: the layouts of the kernel's tables.
    pub abi: u32,
    /// How many pods its tables have room for.
    pub max_pods: u32,
    /// Device and inode of its folder of pins.
    pub pins: (u64, u64),
    /// The cookie of its own network namespace.
    pub netns: u64,
    /// Its process id, as it sees it itself.
    pub pid: u32,
    /// Its pod; empty outside of Kubernetes.
    #[serde(default)]
    pub pod: String,
    /// Its version, for people.
    #[serde(default)]
    pub version: String,
}

impl Greeting {
    /// Whether both work on the same folder of pins.
    pub fn is_of_same_pins(&self, other: &Greeting) -> bool {
        self.pins == other.pins
    }

    /// What keeps `new` from going on with what this one has in the kernel.
    pub fn mismatch(&self, new: &Greeting) -> Option<Mismatch> {
        let differ = |what, old, new| (old != new).then_some(Mismatch { what, old, new });
        differ("hand-over protocol", self.protocol, new.protocol)
            .or_else(|| differ("layout of kernel tables", self.abi, new.abi))
            .or_else(|| differ("number of pods in kernel tables", self.max_pods, new.max_pods))
    }
}

impl fmt::Display for Greeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pod.as_str() {
            "" => write!(f, "pid {}", self.pid)?,
            // Each container counts its processes anew.
            pod => write!(f, "pod {pod}")?,
        }
        write!(f, ", version {}", self.version)
    }
}

/// Two agents that cannot share what is in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub what: &'static str,
    pub old: u32,
    pub new: u32,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { what, old, new } = self;
        write!(f, "{what}: the running agent has {old}, this one {new}")
    }
}

/// A pod that is handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodTold {
    /// Its own UID where istio-cni tells it, else that of its workload.
    pub uid: String,
    /// How istio-cni named it; absent for a pod of the mesh file.
    #[serde(default)]
    pub names: Option<PodNames>,
    /// The cookie of its network namespace.
    pub cookie: u64,
    pub addresses: Vec<IpAddr>,
    /// What each descriptor is, in their order.
    pub descriptors: Vec<Role>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNames {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
}

/// What a descriptor of a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Netns,
    Outbound,
    Plaintext,
    Hbone,
    DnsUdp,
    DnsTcp,
}

/// What the other side should not have sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("cannot read a message: {0}")]
    Unreadable(String),
    #[error("a message was too long")]
    Truncated,
    #[error("more than {0} pods")]
    TooManyPods(usize),
    #[error("the listener of a server {0}")]
    Server(String),
    #[error("{came:?} instead of {wanted}")]
    Unexpected { wanted: &'static str, came: &'static str },
    #[error("{came} descriptors came with a message that names {told}")]
    Descriptors { told: usize, came: usize },
    #[error("the {what} of pod {uid} {why}")]
    Socket { what: &'static str, uid: String, why: String },
    #[error("what came as the folder of pins is another one")]
    Pins,
    #[error("{came} pods came, and {told} were promised")]
    Pods { told: usize, came: usize },
}
