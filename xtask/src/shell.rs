//! What the commands share: telling what happens, and running programs.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The folder of the workspace.
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => root().join(directory),
        None => root().join("target"),
    }
}

/// Runs a program with its output shown.
pub fn run(command: &mut Command) -> Result<()> {
    let line = line(command);
    let status = command.current_dir(root()).status().with_context(|| line.clone())?;
    if !status.success() {
        bail!("`{line}` ended with {status}");
    }
    Ok(())
}

/// Runs a program silently; what it said is shown only when it failed.
pub fn quietly(command: &mut Command) -> Result<()> {
    let line = line(command);
    let output = command.current_dir(root()).stdin(Stdio::null()).output();
    let output = output.with_context(|| line.clone())?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), output.stderr);
        let tail = last_lines(&format!("{out}{}", String::from_utf8_lossy(&err)), 60);
        bail!("`{line}` ended with {}:\n{tail}", output.status);
    }
    Ok(())
}

/// What a program prints, if it can be run and succeeds.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last lines of a text.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}

/// Cargo, as this program was started by.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Finds a program on the path or in the folders where administrators' programs lie.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::home_dir().unwrap_or_default();
    let beside = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let folders = std::env::split_paths(&path).chain(beside).chain([home.join(".cargo/bin")]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Says what is being done, and how it went.
#[derive(Debug)]
pub struct Steps {
    start: Instant,
}

impl Steps {
    /// Begins to count the time.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// Announces what follows.
    pub fn heading(&self, text: &str) {
        println!("\n{}", bold(text));
    }

    /// Does one thing: shown while it runs, and with a tick or a cross when it has ended. What
    /// `work` gives is printed behind its name.
    pub fn step(&self, name: &str, work: impl FnOnce() -> Result<String>) -> Result<()> {
        self.begin(name);
        let start = Instant::now();
        match work() {
            Ok(note) => {
                self.end(&green("✔"), name, &note, start.elapsed());
                Ok(())
            }
            Err(error) => {
                self.end(&red("✘"), name, "", start.elapsed());
                Err(error.context(format!("failed: {name}")))
            }
        }
    }

    /// Tells something that was left out.
    pub fn skipped(&self, name: &str, why: &str) {
        println!("  {} {name}: {why}", yellow("–"));
    }

    /// Tells what came of one thing, with a mark of its own.
    pub fn tell(&self, mark: &str, name: &str, note: &str, took: Duration) {
        self.end(mark, name, note, took);
    }

    /// The time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn begin(&self, name: &str) {
        if std::io::stdout().is_terminal() {
            print!("  … {name} ({:.0} s so far)", self.start.elapsed().as_secs_f64());
            // Only decoration.
            let _ = std::io::stdout().flush();
        }
    }

    fn end(&self, mark: &str, name: &str, note: &str, took: Duration) {
        let back = if std::io::stdout().is_terminal() { "\r\x1b[K" } else { "" };
        let note = if note.is_empty() { String::new() } else { format!(": {note}") };
        let took = if took < Duration::from_secs(1) {
            String::new()
        } else {
            dim(&format!(" ({:.1} s)", took.as_secs_f64()))
        };
        println!("{back}  {mark} {name}{note}{took}");
    }
}

fn painted(code: &str, text: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some() || !std::io::stdout().is_terminal();
    if plain { text.to_owned() } else { format!("\x1b[{code}m{text}\x1b[0m") }
}

pub fn red(text: &str) -> String {
    painted("31;1", text)
}

pub fn green(text: &str) -> String {
    painted("32", text)
}

pub fn yellow(text: &str) -> String {
    painted("33", text)
}

pub fn bold(text: &str) -> String {
    painted("1", text)
}

pub fn dim(text: &str) -> String {
    painted("2", text)
}
