//! A program that needs nothing but a kernel: how it is built, and how that is seen.

use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use object::LittleEndian;
use object::elf::{EM_AARCH64, EM_X86_64, FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};

use crate::shell;

/// A kind of machine, by Go's names, which images use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Architecture {
    Amd64,
    Arm64,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        })
    }
}

impl Architecture {
    /// This machine's.
    pub fn own() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::Amd64 }
    }

    fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Refuses a program that is for other machines, or that asks for a loader of shared libraries.
    pub fn check(self, program: &[u8]) -> Result<()> {
        let header = FileHeader64::<LittleEndian>::parse(program)
            .context("not a 64-bit little-endian ELF file")?;
        let machine = match self {
            Self::Amd64 => EM_X86_64,
            Self::Arm64 => EM_AARCH64,
        };
        let found = header.e_machine(LittleEndian);
        ensure!(found == machine, "made for machine {found} of the ELF list, not for {self}");
        let segments = header.program_headers(LittleEndian, program).context("program headers")?;
        let loader = segments.iter().any(|segment| segment.p_type(LittleEndian) == PT_INTERP);
        ensure!(!loader, "not linked statically: it needs a loader and shared libraries");
        Ok(())
    }
}

/// Builds a release of one of our packages, linked statically against the C library of this
/// machine, in a target folder of its own. Answers where the program is.
///
/// The name of the control plane is looked up by the C library. Linked in, it asks the hosts file and
/// the name servers without plug-ins since glibc 2.34; an older one would not find anybody.
pub fn build(package: &str, program: &str) -> Result<PathBuf> {
    let target = Architecture::own().target();
    let folder = shell::target().join("image");
    let remap = |from: PathBuf, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let home = std::env::home_dir().unwrap_or_default();
    let cargo_home = std::env::var_os("CARGO_HOME").map_or(home.join(".cargo"), PathBuf::from);
    // Where the sources lie must not be seen in the program.
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        remap(cargo_home, "/cargo"),
        remap(shell::root(), "/culvert"),
        remap(folder.clone(), "/target"),
    ];
    let mut cargo = shell::cargo();
    // With a target stated, the flags are kept away from build scripts and macros.
    cargo.args(["build", "--release", "--locked", "--package", package, "--bin", program]);
    cargo.args(["--target", target, "--target-dir"]).arg(&folder);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    // Names of functions stay, for what a panic prints; tables of lines would double the size.
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    shell::run(&mut cargo)?;
    Ok(folder.join(target).join("release").join(program))
}

/// Starts the program where there is no other file, as in its image. Only root can.
pub fn starts_alone(program: &[u8], argument: &str) -> Result<()> {
    let root = shell::target().join("image/root");
    fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
    let file = root.join("program");
    fs::write(&file, program)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    let output = Command::new("chroot").arg(&root).args(["/program", argument]).output();
    let removed = fs::remove_dir_all(&root);
    let output = output.context("chroot")?;
    removed?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        bail!("the program does not start without other files: {}", told.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
