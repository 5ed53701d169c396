//! The two forms of a log line: tab-separated columns for people, JSON for programs.

use std::fmt;
use std::fmt::Write;
use std::str::FromStr;

use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::directives::OWN;

/// More than most lines have, in bytes.
const LINE: usize = 640;

/// `LOG_FORMAT`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// `<time>\t<level>\t<scope>\t<message>\t<fields>`
    #[default]
    Plain,
    /// One object per line, with the same fields under the same names.
    Json,
}

/// A log format that is neither `plain` nor `json`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("log format {0:?} is neither plain nor json")]
pub struct UnknownLogFormat(String);

impl FromStr for LogFormat {
    type Err = UnknownLogFormat;

    fn from_str(text: &str) -> Result<Self, UnknownLogFormat> {
        match text {
            "plain" => Ok(LogFormat::Plain),
            "json" => Ok(LogFormat::Json),
            _ => Err(UnknownLogFormat(text.chars().take(64).collect())),
        }
    }
}

impl<S, N> FormatEvent<S, N> for LogFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _spans: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let head = Head {
            time: Now(OffsetDateTime::now_utc()),
            level: level(*event.metadata().level()),
            scope: scope(event.metadata().target()),
        };
        // Made in one piece: what is given to the writer goes through two others on its way.
        let mut line = String::with_capacity(LINE);
        match self {
            LogFormat::Plain => plain(&head, event, &mut line),
            LogFormat::Json => json(&head, event, &mut line),
        }?;
        line.push('\n');
        writer.write_str(&line)
    }
}

struct Head<'a> {
    time: Now,
    level: &'static str,
    scope: &'a str,
}

/// RFC 3339 in UTC with microseconds.
struct Now(OffsetDateTime);

impl fmt::Display for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.0.to_calendar_date();
        let (hour, minute, second, micro) = self.0.time().as_hms_micro();
        let mut text = *b"0000-00-00T00:00:00.000000Z";
        for (range, number) in [
            (0..4, year.unsigned_abs()),
            (5..7, u8::from(month).into()),
            (8..10, day.into()),
            (11..13, hour.into()),
            (14..16, minute.into()),
            (17..19, second.into()),
            (20..26, micro),
        ] {
            let mut rest = number;
            for digit in text.get_mut(range).unwrap_or_default().iter_mut().rev() {
                *digit += (rest % 10) as u8;
                rest /= 10;
            }
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

fn scope(target: &str) -> &str {
    target.strip_prefix(OWN).unwrap_or(target)
}

fn plain(head: &Head, event: &Event, line: &mut String) -> fmt::Result {
    let Head { time, level, scope } = head;
    write!(line, "{time}\t{level}\t{scope}\t")?;
    let mut message = PlainMessage { line, result: Ok(()) };
    event.record(&mut message);
    message.result?;
    let mut fields = PlainFields { line, first: true, result: Ok(()) };
    event.record(&mut fields);
    fields.result
}

const MESSAGE: &str = "message";

/// Writes the message only, whatever its place among the fields.
struct PlainMessage<'a> {
    line: &'a mut String,
    result: fmt::Result,
}

impl Visit for PlainMessage<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == MESSAGE && self.result.is_ok() {
            self.result = write!(OneLine(self.line), "{value:?}");
        }
    }
}

/// Writes `key=value` of all fields but the message.
struct PlainFields<'a> {
    line: &'a mut String,
    first: bool,
    result: fmt::Result,
}

impl PlainFields<'_> {
    fn write(&mut self, field: &Field, value: impl FnOnce(&mut String) -> fmt::Result) {
        if field.name() == MESSAGE || self.result.is_err() {
            return;
        }
        self.line.push(if std::mem::take(&mut self.first) { '\t' } else { ' ' });
        self.line.push_str(field.name());
        self.line.push('=');
        self.result = value(self.line);
    }
}

impl Visit for PlainFields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, |line| match is_plain(value) {
            // As below, for what nearly all values are.
            true => {
                line.push('"');
                line.push_str(value);
                line.push('"');
                Ok(())
            }
            false => write!(OneLine(line), "{value:?}"),
        });
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write(field, |line| write!(OneLine(line), "{value:?}"));
    }
}

/// Whether nothing of a text is escaped between quotes.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\')
}

/// Escapes control characters, so that no value from elsewhere can begin a line of its own.
struct OneLine<'a>(&'a mut String);

impl fmt::Write for OneLine<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // Bytes of which control characters are made: C0, DEL, and the lead byte of C1.
        if !text.bytes().any(|byte| byte < 0x20 || byte == 0x7f || byte == 0xc2) {
            self.0.push_str(text);
            return Ok(());
        }
        let mut rest = text;
        while let Some((start, control)) = rest.char_indices().find(|(_, c)| c.is_control()) {
            let (clean, tail) = rest.split_at(start);
            self.0.push_str(clean);
            write!(self.0, "{}", control.escape_default())?;
            rest = tail.strip_prefix(control).unwrap_or_default();
        }
        self.0.push_str(rest);
        Ok(())
    }
}

fn json(head: &Head, event: &Event, line: &mut String) -> fmt::Result {
    let Head { time, level, scope } = head;
    write!(line, "{{\"level\":\"{level}\",\"time\":\"{time}\",\"scope\":{}", quoted(scope)?)?;
    // The message comes before the fields, whatever its place among them.
    for message in [true, false] {
        let mut fields = JsonFields { line, message, result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
    }
    line.push('}');
    Ok(())
}

/// Writes either the message or all fields but the message.
struct JsonFields<'a> {
    line: &'a mut String,
    message: bool,
    result: fmt::Result,
}

impl JsonFields<'_> {
    fn write(&mut self, field: &Field, value: impl FnOnce() -> Result<String, fmt::Error>) {
        if (field.name() == MESSAGE) == self.message && self.result.is_ok() {
            self.result =
                quoted(field.name()).and_then(|name| write!(self.line, ",{name}:{}", value()?));
        }
    }
}

impl Visit for JsonFields<'_> {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, || Ok(value.to_string()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, || Ok(value.to_string()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, || Ok(value.to_string()));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // What is not finite has no number in JSON and becomes null.
        self.write(field, || serde_json::to_string(&value).map_err(|_| fmt::Error));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, || quoted(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write(field, || quoted(&format!("{value:?}")));
    }
}

fn quoted(text: &str) -> Result<String, fmt::Error> {
    serde_json::to_string(text).map_err(|_| fmt::Error)
}
