//! Builds the kernel programs for `bpfel-unknown-none` and leaves the object in `OUT_DIR`.
//!
//! That target has no prebuilt `core`, so a compiler that knows `-Z build-std` and the library's
//! sources are needed beside the stable toolchain that builds the agent, and `bpf-linker` to link.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The binary of the kernel crate.
const PROGRAM: &str = "culvert";
/// What `agent/src/capture/object.rs` includes.
const OBJECT: &str = "culvert.bpf.o";

fn main() -> ExitCode {
    tell_version();
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            println!("cargo::error={problem}");
            ExitCode::FAILURE
        }
    }
}

/// What the configuration dump says of the program. Without git or its repository, nothing is known.
fn tell_version() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let revision = git(&["rev-parse", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    let status = match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => "Clean",
        Some(_) => "Modified",
        None => "unknown",
    };
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    println!("cargo::rustc-env=CULVERT_GIT_REVISION={revision}");
    println!("cargo::rustc-env=CULVERT_BUILD_STATUS={status}");
    println!("cargo::rustc-env=CULVERT_RUST_VERSION={}", version.unwrap_or_default());
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(required("OUT_DIR")?);
    let ebpf = Path::new(&required("CARGO_MANIFEST_DIR")?).join("../ebpf");
    for input in ["src", "Cargo.toml", "Cargo.lock", "abi/src", "abi/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", ebpf.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=BPF_LINKER");

    let toolchain = Toolchain::find()?;
    let linker = linker()?;
    let target = match required("CARGO_CFG_TARGET_ENDIAN")?.to_str() {
        Some("big") => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let target_dir = out.join("ebpf");
    let mut arch = OsString::from("--cfg=bpf_target_arch=\"");
    arch.push(required("CARGO_CFG_TARGET_ARCH")?);
    arch.push("\"");
    let mut linker_flag = OsString::from("-Clinker=");
    linker_flag.push(&linker);
    // Debug information must not tell where the sources lie, which would make each folder's program
    // another one.
    let sources = std::fs::canonicalize(&ebpf)
        .map_err(|error| format!("the kernel programs' folder {}: {error}", ebpf.display()))?;
    let sources = remap(&sources, "/culvert/ebpf");
    let libraries = remap(&cargo_home().unwrap_or_else(|| "/cargo".into()), "/cargo");
    let flags: [&OsStr; 7] = [
        &arch,
        &linker_flag,
        &sources,
        &libraries,
        "-Cdebuginfo=2".as_ref(),
        "-Clink-arg=--btf".as_ref(),
        "-Ccodegen-units=1".as_ref(),
    ];

    let mut cargo = toolchain.cargo();
    cargo
        .current_dir(&ebpf)
        .args([
            "build",
            "--release",
            "--locked",
            "--quiet",
            "-Z",
            "build-std=core",
            "--target",
            target,
        ])
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(OsStr::new("\u{1f}")));
    let built = cargo.output().map_err(|error| format!("{cargo:?} does not start: {error}"))?;
    if !built.status.success() {
        let told = String::from_utf8_lossy(&built.stderr);
        for line in told.lines() {
            println!("cargo::warning={line}");
        }
        return Err(format!("the kernel programs do not build with {}", toolchain.describe()));
    }
    let object = target_dir.join(target).join("release").join(PROGRAM);
    let copy = out.join(OBJECT);
    std::fs::copy(&object, &copy)
        .map_err(|error| format!("copying {} to {}: {error}", object.display(), copy.display()))?;
    Ok(())
}

fn remap(from: &Path, to: &str) -> OsString {
    let mut flag = OsString::from("--remap-path-prefix=");
    flag.push(from);
    flag.push("=");
    flag.push(to);
    flag
}

/// A compiler that can build `core`.
enum Toolchain {
    /// rustup's nightly.
    Nightly { rustup: PathBuf },
    /// The distribution's, allowed to use unstable flags.
    System { cargo: PathBuf, rustc: PathBuf },
}

impl Toolchain {
    fn find() -> Result<Toolchain, String> {
        let nightly = find_program("rustup")
            .map(|rustup| Toolchain::Nightly { rustup })
            .filter(Toolchain::has_library_sources);
        let system = || {
            let [cargo, rustc] = ["/usr/bin/cargo", "/usr/bin/rustc"].map(PathBuf::from);
            (cargo.exists() && rustc.exists()).then_some(Toolchain::System { cargo, rustc })
        };
        nightly.or_else(|| system().filter(Toolchain::has_library_sources)).ok_or_else(|| {
            "the kernel programs need Rust's library sources: run `cargo xtask setup`, or install \
             rustup's nightly with rust-src, or Debian's rustc-web, cargo-web and rust-web-src"
                .into()
        })
    }

    fn has_library_sources(&self) -> bool {
        let mut rustc = match self {
            Toolchain::Nightly { rustup } => {
                let mut rustc = clean(rustup);
                rustc.args(["run", "nightly", "rustc"]);
                rustc
            }
            Toolchain::System { rustc, .. } => clean(rustc),
        };
        let Ok(told) = rustc.args(["--print", "sysroot"]).output() else { return false };
        let sysroot = String::from_utf8_lossy(&told.stdout);
        told.status.success()
            && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").exists()
    }

    fn cargo(&self) -> Command {
        match self {
            Toolchain::Nightly { rustup } => {
                let mut cargo = clean(rustup);
                cargo.args(["run", "nightly", "cargo"]);
                cargo
            }
            Toolchain::System { cargo, rustc } => {
                let mut cargo = clean(cargo);
                cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
                cargo
            }
        }
    }

    fn describe(&self) -> &'static str {
        match self {
            Toolchain::Nightly { .. } => "rustup's nightly",
            Toolchain::System { .. } => "/usr/bin/rustc",
        }
    }
}

fn linker() -> Result<PathBuf, String> {
    if let Some(linker) = env::var_os("BPF_LINKER").map(PathBuf::from) {
        let missing = format!("BPF_LINKER names {}, which does not exist", linker.display());
        return linker.is_file().then_some(linker).ok_or(missing);
    }
    find_program("bpf-linker").ok_or_else(|| {
        "the kernel programs need bpf-linker: run `cargo xtask setup`, or see \
         https://github.com/aya-rs/bpf-linker, or name it in BPF_LINKER"
            .into()
    })
}

fn cargo_home() -> Option<PathBuf> {
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}

/// Looks along `PATH` and in cargo's own folder.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_home().map(|home| home.join("bin")))
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// A command that does not inherit what cargo, rustup and the user set for the agent's own build.
fn clean(program: &Path) -> Command {
    let keep = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "RUSTUP_HOME"];
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let foreign = text.starts_with("CARGO") || text.starts_with("RUST");
        if foreign && !keep.iter().any(|kept| text.starts_with(kept)) {
            command.env_remove(&name);
        }
    }
    command
}

fn required(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("cargo did not set {name}"))
}
