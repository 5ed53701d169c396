//! Tables as kubectl and istioctl print them: capital headers, no borders, no wrapping.

use std::time::Duration;

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Row};

/// Rows of text under headers.
pub(super) struct Table {
    headers: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(headers: &'static [&'static str]) -> Self {
        Table { headers, rows: Vec::new() }
    }

    /// Takes as many cells as there are headers. Empty ones show as a dash.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        let shown = cells.into_iter().map(|cell| if cell.is_empty() { "-".into() } else { cell });
        self.rows.push(shown.collect());
    }

    pub(super) fn render(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(Row::from(self.headers.iter().copied()));
        for row in &self.rows {
            table.add_row(Row::from(row.iter().map(|cell| cell.replace('\n', " "))));
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 3));
        }
        let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
        lines.join("\n")
    }
}

/// The largest unit alone, as `5s`, `3m`, `2h` or `4d`.
pub(super) fn age(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        86_400.. => format!("{}d", seconds / 86_400),
    }
}

/// `512 B`, `1.5 KiB`, `20.0 MiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while value >= 1024.0
        && let Some(next) = units.next()
    {
        value /= 1024.0;
        unit = Some(next);
    }
    format!("{value:.1} {}", unit.unwrap_or(&"B"))
}
