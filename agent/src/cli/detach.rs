//! What `detach` took out of the kernel, in words.

use std::path::Path;

use super::status::count;
use crate::capture::DetachReport;

pub(super) fn text(pin_path: &Path, report: &DetachReport) -> String {
    let pins = pin_path.display();
    if *report == DetachReport::default() {
        return format!("nothing was attached: no pins in {pins}");
    }
    let programs = count(report.programs as u64, "program", "programs");
    let pods = count(report.pods as u64, "pod", "pods");
    let mut text = format!("removed {programs} and {pods} of {pins}");
    if report.ended > 0 {
        let ended = count(report.ended as u64, "connection", "connections");
        text.push_str(&format!("\nended {ended} that the kernel accelerated"));
    }
    if !report.unreachable.is_empty() {
        let cookies: Vec<String> = report.unreachable.iter().map(ToString::to_string).collect();
        text.push_str(&format!(
            "\nrouting rules stay in network namespaces that cannot be entered until they end: {}",
            cookies.join(", ")
        ));
    }
    text
}
