//! The Rust files of the workspace, read and parsed once for all rules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::spanned::Spanned;

/// One file.
pub struct Source {
    /// Its path below the workspace.
    pub path: PathBuf,
    /// The package's folder.
    pub package: String,
    /// The module that the file is, from the crate's root; empty for the root itself. `None` for
    /// files outside of `src`, such as build scripts.
    pub module: Option<Vec<String>>,
    pub text: String,
    pub parsed: syn::File,
    /// Whether the whole file is tests.
    pub tests: bool,
}

/// Folders that hold a package each, the deeper ones first.
pub const PACKAGES: [&str; 8] =
    ["agent/core", "agent", "ebpf/abi", "ebpf", "proto", "tests/lab", "tests", "xtask"];

/// Reads every file of every package.
pub fn all(root: &Path) -> Result<Vec<Source>> {
    let mut paths = Vec::new();
    walk(root, root, &mut paths)?;
    paths.sort();
    let sources = paths.into_iter().map(|path| {
        let text = fs::read_to_string(root.join(&path));
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        Source::parse(&path, text)
    });
    sources.filter_map(Result::transpose).collect()
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let entry = entry.context("reading a folder")?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                walk(root, &path, found)?;
            }
        } else if name.ends_with(".rs") {
            found.push(path.strip_prefix(root).unwrap_or(&path).to_owned());
        }
    }
    Ok(())
}

impl Source {
    /// Parses one file; `None` for a file of no package.
    pub fn parse(path: &Path, text: String) -> Result<Option<Self>> {
        let Some(package) = PACKAGES.iter().find(|package| path.starts_with(package)) else {
            return Ok(None);
        };
        let parsed =
            syn::parse_file(&text).with_context(|| format!("parsing {}", path.display()))?;
        let module = path.strip_prefix(Path::new(package).join("src")).ok().map(module_of);
        let below = path.strip_prefix(package).unwrap_or(path);
        let scenario =
            *package == "tests" || below.components().any(|part| part.as_os_str() == "tests");
        let tests = scenario || path.file_name().is_some_and(|name| name == "tests.rs");
        let path = path.to_owned();
        Ok(Some(Self { path, package: (*package).to_owned(), module, text, parsed, tests }))
    }
}

fn module_of(inside: &Path) -> Vec<String> {
    let whole = inside.with_extension("");
    let mut module: Vec<String> =
        whole.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    if matches!(module.last().map(String::as_str), Some("lib" | "main" | "mod")) {
        module.pop();
    }
    module
}

/// Whether an item is compiled for tests only.
pub fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let test = attribute.path().is_ident("test") || last_is_test(attribute.path());
        let cfg = attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"));
        test || cfg
    })
}

/// `#[tokio::test]` and its like.
fn last_is_test(path: &syn::Path) -> bool {
    path.segments.last().is_some_and(|segment| segment.ident == "test")
}

/// The first and the last line of something parsed.
pub fn lines(spanned: &impl Spanned) -> (usize, usize) {
    let span = spanned.span();
    (span.start().line, span.end().line)
}
