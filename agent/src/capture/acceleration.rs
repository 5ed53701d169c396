//! Acceleration of direct connections: whether this kernel has what it takes, and turning it on.

use aya::maps::{MapData, SockHash};
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_program_supported};
use culvert_abi::direct::{JOINED_MAP, JointKey, Offsets, SK_MSG_PROGRAM};

use super::btf::{Btf, BtfError};
use super::links::Programs;
use super::{Capture, CaptureError, maps};

/// That this kernel can join the sockets of a connection, and where it keeps what the programs look
/// at. It says nothing about how well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acceleration(Offsets);

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum NoAcceleration {
    #[error("{feature} needs Linux {needs}")]
    Missing { feature: &'static str, needs: &'static str },
    #[error("what the kernel supports is not known: {0}")]
    Unknown(String),
    #[error(transparent)]
    Btf(#[from] BtfError),
}

impl Acceleration {
    /// Asks the kernel. Blocks for some milliseconds.
    pub fn find() -> Result<Acceleration, NoAcceleration> {
        let unknown =
            |error: aya::programs::ProgramError| NoAcceleration::Unknown(error.to_string());
        let require = |feature, needs, supported| match supported {
            true => Ok(()),
            false => Err(NoAcceleration::Missing { feature, needs }),
        };
        let helper = |helper| is_helper_supported(ProgramType::SkMsg, helper).map_err(unknown);
        require("sk_msg", "4.17", is_program_supported(ProgramType::SkMsg).map_err(unknown)?)?;
        let storage = helper(BpfHelper::BPF_FUNC_sk_storage_get)?;
        require("socket storage in sk_msg", "5.8", storage)?;
        let probe = helper(BpfHelper::BPF_FUNC_probe_read_kernel)?;
        require("bpf_probe_read_kernel in sk_msg", "5.8", probe)?;
        let btf = Btf::of_kernel()?;
        let at = |structure, path| btf.offset(structure, path);
        Ok(Acceleration(Offsets {
            state: at("sock", "__sk_common.skc_state")?,
            rmem_alloc: at("sock", "sk_backlog.rmem_alloc")?,
            rcvbuf: at("sock", "sk_rcvbuf")?,
            rcvlowat: at("sock", "sk_rcvlowat")?,
            owned: at("sock", "sk_lock.owned")?,
            wq: at("sock", "sk_wq")?,
            user_data: at("sock", "sk_user_data")?,
            ulp_ops: at("inet_connection_sock", "icsk_ulp_ops")?,
            write_seq: at("tcp_sock", "write_seq")?,
            copied_seq: at("tcp_sock", "copied_seq")?,
            waiting: at("socket_wq", "wait.head")?,
            entry: at("wait_queue_entry", "entry")?,
            private: at("wait_queue_entry", "private")?,
            users: at("sk_psock", "refcnt")?,
        }))
    }

    pub(super) fn offsets(self) -> Offsets {
        self.0
    }
}

impl Capture {
    /// Lets connections be accelerated whose verdicts say so. Those that are stay so until they end,
    /// also without an agent.
    pub fn accelerate(&self) -> Result<(), CaptureError> {
        let mut object = self.loader.load(None)?;
        let joined: SockHash<MapData, JointKey> = maps::take(&mut object, JOINED_MAP)?;
        let mut programs = Programs::new(&mut object);
        programs.attach_to_sockets(SK_MSG_PROGRAM, &joined)?;
        self.programs.lock().extend(programs.ids());
        Ok(())
    }
}
