//! The only place that writes for the user.

use std::fmt;
use std::io::{self, Write};

use serde_json::Value;

use super::table::Table;

/// Where a command's result goes.
pub(super) struct Output {
    writer: Box<dyn Write + Send>,
}

impl Output {
    pub(super) fn standard() -> Self {
        Self::to(io::stdout())
    }

    pub(super) fn to(writer: impl Write + Send + 'static) -> Self {
        Output { writer: Box::new(writer) }
    }

    pub(super) fn json(&mut self, value: &Value) -> io::Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
        self.line(&text)
    }

    pub(super) fn table(&mut self, table: &Table) -> io::Result<()> {
        self.text(&table.render())
    }

    /// Ends the text with a line break if it does not.
    pub(super) fn text(&mut self, text: &str) -> io::Result<()> {
        self.line(&text.strip_suffix('\n').unwrap_or(text))
    }

    pub(super) fn line(&mut self, line: &dyn fmt::Display) -> io::Result<()> {
        writeln!(self.writer, "{line}")?;
        self.writer.flush()
    }
}

/// One line on standard error.
pub(super) fn tell_error(error: &dyn fmt::Display) {
    // Nothing is left to tell when standard error is gone.
    let _ = writeln!(io::stderr(), "culvert: {error}");
}
