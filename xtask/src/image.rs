//! `cargo xtask image`: the agent as an image for containers, made without Docker.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::setup::{self, Purpose};
use crate::shell::{self, Steps};

mod archive;
mod layer;
mod program;

pub use archive::{Image, archive};
pub use layer::Entry;
pub use program::{Architecture, build, starts_alone};

/// Make an image archive of the agent, for `docker load`, `ctr image import` and `kind load`
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Where to write it [default: target/culvert-ARCH.tar]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// What the image is called [default: culvert:VERSION]
    #[arg(short, long, value_name = "NAME:TAG")]
    tag: Option<String>,
    /// For which machines; another than this one's needs --binary
    #[arg(long, value_enum, default_value_t = Architecture::own())]
    arch: Architecture,
    /// Pack this program instead of building it; it must need no shared libraries
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Make the image of the test application instead, which `cargo xtask e2e` puts into pods
    #[arg(long)]
    apps: bool,
    /// Also put the files of the image into this folder, which must be new or empty
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// What the program is called.
    fn name(&self) -> &'static str {
        if self.apps { "culvert-app" } else { "culvert" }
    }
}

/// Where programs are in the image.
const PROGRAMS: &str = "usr/local/bin";

pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = Steps::new();
    let binary = match &arguments.binary {
        Some(binary) => binary.clone(),
        None if arguments.arch == Architecture::own() => {
            setup::ensure(&steps, Purpose::Build)?;
            if arguments.apps {
                build("culvert-tests", "culvert-app")?
            } else {
                build("culvert-agent", "culvert")?
            }
        }
        None => bail!(
            "this machine builds for {}; build elsewhere and name the program with --binary",
            Architecture::own()
        ),
    };
    let program = fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
    arguments.arch.check(&program).with_context(|| binary.display().to_string())?;
    if arguments.arch == Architecture::own() && culvert_lab::sys::is_root() {
        starts_alone(&program, "--version")?;
    }
    let image = if arguments.apps { apps(arguments, program)? } else { agent(arguments, program)? };
    if let Some(folder) = &arguments.files {
        spread(&image.entries, folder)?;
    }
    let made = archive(&image)?;
    let output = arguments.output.clone().unwrap_or_else(|| {
        shell::target().join(format!("{}-{}.tar", arguments.name(), arguments.arch))
    });
    fs::write(&output, &made.bytes).with_context(|| format!("writing {}", output.display()))?;
    if arguments.json {
        let told = json!({
            "file": output, "image": image.reference, "digest": made.digest,
            "bytes": made.compressed,
        });
        println!("{told}");
    } else {
        let megabytes = made.compressed as f64 / 1e6;
        println!("{} {}", shell::green("✔"), image.reference);
        println!("  file    {}", output.display());
        println!("  size    {megabytes:.1} MB to fetch");
        println!("  digest  {}", made.digest);
    }
    Ok(())
}

fn agent(arguments: &Arguments, program: Vec<u8>) -> Result<Image> {
    let version = env!("CARGO_PKG_VERSION");
    let file = |text: &str| Entry::File(0o644, text.as_bytes().to_vec());
    let path = format!("{PROGRAMS}/{}", arguments.name());
    let entries = [
        (path.as_str(), Entry::File(0o755, program)),
        ("etc/passwd", file(include_str!("../../deploy/image/passwd"))),
        ("etc/group", file(include_str!("../../deploy/image/group"))),
        ("tmp", Entry::Directory(0o1777)),
    ];
    let labels = [
        ("org.opencontainers.image.title", "culvert"),
        ("org.opencontainers.image.description", "node agent for Istio ambient meshes"),
        ("org.opencontainers.image.version", version),
        ("org.opencontainers.image.licenses", "Apache-2.0"),
    ];
    Ok(Image {
        reference: arguments.tag.clone().unwrap_or_else(|| format!("culvert:{version}")),
        architecture: arguments.arch.to_string(),
        entrypoint: vec![format!("/{path}")],
        arguments: vec!["run".to_owned()],
        entries: entries.map(|(path, entry)| (path.to_owned(), entry)).into(),
        labels: labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        created: created()?,
    })
}

/// The test application: nothing but the program, which needs no account of its own either.
fn apps(arguments: &Arguments, program: Vec<u8>) -> Result<Image> {
    let path = format!("{PROGRAMS}/{}", arguments.name());
    Ok(Image {
        reference: arguments.tag.clone().unwrap_or_else(|| "culvert-app:dev".to_owned()),
        architecture: arguments.arch.to_string(),
        entrypoint: vec![format!("/{path}")],
        arguments: vec!["serve".to_owned()],
        entries: BTreeMap::from([(path, Entry::File(0o755, program))]),
        labels: BTreeMap::from([(
            "org.opencontainers.image.title".to_owned(),
            "culvert-app".to_owned(),
        )]),
        created: created()?,
    })
}

/// `SOURCE_DATE_EPOCH` (reproducible-builds.org), or else the time of the last commit, or else
/// 1970: never the clock, so that the same sources make the same image.
pub fn created() -> Result<u64> {
    if let Some(stated) = std::env::var_os("SOURCE_DATE_EPOCH") {
        let stated = stated.to_string_lossy();
        return stated
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH: {stated:?} is not a number of seconds"));
    }
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%ct"]).current_dir(shell::root());
    Ok(shell::output(&mut git).and_then(|time| time.trim().parse().ok()).unwrap_or(0))
}

fn spread(entries: &BTreeMap<String, Entry>, folder: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;

    if fs::read_dir(folder).is_ok_and(|mut inside| inside.next().is_some()) {
        bail!("{} is not empty", folder.display());
    }
    for (path, entry) in entries {
        let path = folder.join(path);
        let failed = || format!("writing {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(folder)).with_context(failed)?;
        let mode = match entry {
            Entry::Directory(mode) => {
                fs::create_dir(&path).with_context(failed)?;
                mode
            }
            Entry::File(mode, bytes) => {
                fs::write(&path, bytes).with_context(failed)?;
                mode
            }
        };
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).with_context(failed)?;
    }
    Ok(())
}
