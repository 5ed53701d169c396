//! Attaching programs by pinned links, and replacing the program behind a link that exists.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::maps::{MapData, SockHash};
use aya::pin::PinError;
use aya::programs::links::FdLink;
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, Program, ProgramError, ProgramFd, SkLookup, SkMsg, SockOps,
};
use aya::{Ebpf, Pod};

use super::{CaptureError, sys};

/// The programs of a loaded object.
pub struct Programs<'a>(&'a mut Ebpf);

impl<'a> Programs<'a> {
    pub fn new(object: &'a mut Ebpf) -> Self {
        Self(object)
    }

    /// Name and kernel id of each program that is loaded.
    pub fn ids(&self) -> Vec<(String, u32)> {
        let loaded = self.0.programs().filter_map(|(name, program)| {
            program.info().ok().map(|info| (name.to_owned(), info.id()))
        });
        loaded.collect()
    }

    /// Attaches a program to a cgroup, or replaces the one behind the link pinned at `pin`.
    pub fn attach_to_cgroup(
        &mut self,
        name: &'static str,
        cgroup: BorrowedFd,
        pin: &Path,
    ) -> Result<(), CaptureError> {
        let failed = |error| CaptureError::Program { program: name, error: Box::new(error) };
        let program = self.program(name).map_err(failed)?;
        // Cgroup links always go beside other programs; any flag is an error.
        let mode = CgroupAttachMode::Single;
        let (link, _former) = match program {
            Program::CgroupSockAddr(program) => {
                program.load().map_err(failed)?;
                match replace(pin, program.fd().map_err(failed)?, cgroup).map_err(failed)? {
                    Replaced::Yes => return Ok(()),
                    Replaced::No(former) => {
                        (link_address(program, cgroup, mode).map_err(failed)?, former)
                    }
                }
            }
            Program::SockOps(program) => {
                program.load().map_err(failed)?;
                match replace(pin, program.fd().map_err(failed)?, cgroup).map_err(failed)? {
                    Replaced::Yes => return Ok(()),
                    Replaced::No(former) => {
                        (link_operations(program, cgroup, mode).map_err(failed)?, former)
                    }
                }
            }
            _ => return Err(failed(ProgramError::UnexpectedProgramType)),
        };
        pin_link(link, pin).map_err(failed)
    }

    /// Attaches a program to a network namespace.
    pub fn attach_to_netns(
        &mut self,
        name: &'static str,
        netns: BorrowedFd,
        pin: &Path,
    ) -> Result<(), CaptureError> {
        let failed = |error| CaptureError::Program { program: name, error: Box::new(error) };
        let program = self.lookup(name).map_err(failed)?;
        program.load().map_err(failed)?;
        let id = program.attach(netns).map_err(failed)?;
        let link = program.take_link(id).map_err(failed)?;
        pin_link(link.into(), pin).map_err(failed)
    }

    /// Attaches a program to the sockets of a map, or replaces the one that it has: for sockets that
    /// join the map from then on. It stays for as long as the map does.
    pub fn attach_to_sockets<K: Pod>(
        &mut self,
        name: &'static str,
        map: &SockHash<MapData, K>,
    ) -> Result<(), CaptureError> {
        let failed = |error| CaptureError::Program { program: name, error: Box::new(error) };
        let program: &mut SkMsg = self.program(name).and_then(TryInto::try_into).map_err(failed)?;
        program.load().map_err(failed)?;
        let id = program.attach(map.fd()).map_err(failed)?;
        // Dropped, it would detach.
        std::mem::forget(program.take_link(id).map_err(failed)?);
        Ok(())
    }

    /// Replaces the program behind a link to a network namespace.
    pub fn replace_in_netns(
        &mut self,
        name: &'static str,
        link: BorrowedFd,
    ) -> Result<(), CaptureError> {
        let failed = |error| CaptureError::Program { program: name, error: Box::new(error) };
        let program = self.lookup(name).map_err(failed)?;
        program.load().map_err(failed)?;
        let fd = program.fd().map_err(failed)?;
        sys::link_update(link, fd.as_fd()).map_err(|error| failed(update_error(error)))
    }

    fn program(&mut self, name: &str) -> Result<&mut Program, ProgramError> {
        self.0.program_mut(name).ok_or(ProgramError::NotLoaded)
    }

    fn lookup(&mut self, name: &str) -> Result<&mut SkLookup, ProgramError> {
        self.program(name)?.try_into()
    }
}

fn link_address(
    program: &mut CgroupSockAddr,
    cgroup: BorrowedFd,
    mode: CgroupAttachMode,
) -> Result<FdLink, ProgramError> {
    let id = program.attach(cgroup, mode)?;
    program.take_link(id)?.try_into().map_err(|_| ProgramError::NotAttached)
}

fn link_operations(
    program: &mut SockOps,
    cgroup: BorrowedFd,
    mode: CgroupAttachMode,
) -> Result<FdLink, ProgramError> {
    let id = program.attach(cgroup, mode)?;
    program.take_link(id)?.try_into().map_err(|_| ProgramError::NotAttached)
}

/// Whether there was a link to put the program behind.
enum Replaced {
    Yes,
    /// One to another cgroup has lost its pin, and goes when this is dropped.
    No(Option<OwnedFd>),
}

fn replace(pin: &Path, program: &ProgramFd, cgroup: BorrowedFd) -> Result<Replaced, ProgramError> {
    let link = match sys::pinned(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Replaced::No(None)),
        Err(error) => return Err(update_error(error)),
    };
    let wanted = sys::inode(cgroup).map_err(update_error)?;
    if sys::link_cgroup(link.as_fd()).map_err(update_error)? != wanted {
        fs::remove_file(pin).map_err(update_error)?;
        return Ok(Replaced::No(Some(link)));
    }
    sys::link_update(link.as_fd(), program.as_fd()).map_err(update_error)?;
    Ok(Replaced::Yes)
}

/// From here on the link outlives its descriptor.
fn pin_link(link: FdLink, pin: &Path) -> Result<(), ProgramError> {
    match link.pin(pin) {
        Ok(_) => Ok(()),
        Err(PinError::SyscallError(error)) => Err(ProgramError::SyscallError(error)),
        Err(error) => Err(ProgramError::IOError(io::Error::other(error))),
    }
}

fn update_error(error: io::Error) -> ProgramError {
    ProgramError::IOError(error)
}
