//! Which lines of the log are wanted: a level for all, and levels for single scopes.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};

/// Comma-separated `level`, `scope=level` or `scope:level`.
///
/// A scope is what stands in the log's third column: `access`, a module such as `hbone` or
/// `hbone::pool`, or another crate's name; it covers what lies below it. Levels are `off`,
/// `error`, `warn`, `info`, `debug` and `trace`; `warning` and `critical` are understood too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directives {
    /// `None`: not mentioned; info where nothing lies below.
    everything: Option<LevelFilter>,
    scopes: BTreeMap<String, LevelFilter>,
}

/// A part of the directives that is no level and no `scope=level`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDirective {
    #[error("{0:?} is not a level: off, error, warn, info, debug or trace")]
    Level(String),
    #[error("{0:?} is not a scope: letters, digits, '_', '-' and '::'")]
    Scope(String),
}

impl Directives {
    /// Changes what `changes` mention and keeps the rest.
    pub(super) fn lay_over(&mut self, changes: &Directives) {
        self.everything = changes.everything.or(self.everything);
        self.scopes.extend(changes.scopes.iter().map(|(scope, level)| (scope.clone(), *level)));
    }

    /// Nothing is mentioned.
    pub fn is_empty(&self) -> bool {
        self.everything.is_none() && self.scopes.is_empty()
    }

    /// Whether a line of this target at debug is wanted.
    pub fn want_debug(&self, target: &str) -> bool {
        self.targets().would_enable(target, &tracing::Level::DEBUG)
    }

    pub(super) fn targets(&self) -> Targets {
        // A scope may be one of ours, written without the crate, or another crate.
        self.scopes.iter().fold(
            Targets::new().with_default(self.everything.unwrap_or(LevelFilter::INFO)),
            |targets, (scope, level)| {
                targets
                    .with_target(scope.clone(), *level)
                    .with_target(format!("{OWN}{scope}"), *level)
            },
        )
    }
}

/// What targets of this crate begin with.
pub(super) const OWN: &str = "culvert_agent::";

impl FromStr for Directives {
    type Err = InvalidDirective;

    fn from_str(text: &str) -> Result<Self, InvalidDirective> {
        let mut directives = Directives::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.split_once('=').or_else(|| part.rsplit_once(':')) {
                Some((scope, name)) => {
                    let scope = scope.strip_prefix(OWN).unwrap_or(scope);
                    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-:".contains(&b);
                    if scope.is_empty() || scope.ends_with(':') || !scope.bytes().all(plain) {
                        return Err(InvalidDirective::Scope(shortened(scope)));
                    }
                    directives.scopes.insert(scope.to_owned(), level(name)?);
                }
                None => directives.everything = Some(level(part)?),
            }
        }
        Ok(directives)
    }
}

fn level(name: &str) -> Result<LevelFilter, InvalidDirective> {
    match name.trim().to_ascii_lowercase().as_str() {
        "off" => Ok(LevelFilter::OFF),
        "error" | "critical" => Ok(LevelFilter::ERROR),
        "warn" | "warning" => Ok(LevelFilter::WARN),
        "info" => Ok(LevelFilter::INFO),
        "debug" => Ok(LevelFilter::DEBUG),
        "trace" => Ok(LevelFilter::TRACE),
        _ => Err(InvalidDirective::Level(shortened(name))),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

/// The text that means the same: scopes in order, then the level of everything.
impl fmt::Display for Directives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (scope, level) in &self.scopes {
            write!(f, "{scope}={level},")?;
        }
        write!(f, "{}", self.everything.unwrap_or(LevelFilter::INFO))
    }
}
