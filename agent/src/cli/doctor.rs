//! What was found out about this machine, for people and for programs.

use serde_json::Value;

use super::table::Table;
use crate::doctor::{DoctorError, Outcome, Report};

pub(super) fn json(report: &Report) -> Result<Value, DoctorError> {
    let mut value = serde_json::to_value(report)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("qualifies".to_owned(), report.qualifies().into());
    }
    Ok(value)
}

pub(super) fn text(report: &Report) -> String {
    let mut facts = Table::new(&["KERNEL HAS", "NEEDS LINUX", ""]);
    for fact in &report.facts {
        let supported = if fact.supported { "yes" } else { "NO" };
        facts.row(vec![fact.name.clone(), fact.needs.clone(), supported.to_owned()]);
    }
    let mut parts = vec![format!("Linux {}", report.kernel), facts.render()];
    if !report.cases.is_empty() {
        let mut cases = Table::new(&["ACCELERATED", "RESULT", "SEEN", "EXPECTED"]);
        for case in &report.cases {
            let result = match case.result {
                Outcome::Passed => "passed",
                Outcome::Differs => "differs",
                Outcome::Failed => "FAILS",
            };
            let seen = case.seen.clone().unwrap_or_default();
            cases.row(vec![case.name.clone(), result.to_owned(), seen, case.expected.clone()]);
        }
        parts.push(cases.render());
    }
    parts.push(verdict(report));
    parts.join("\n\n")
}

fn verdict(report: &Report) -> String {
    if let Some(lacking) = &report.lacking {
        return format!("Nothing can be accelerated here: {lacking}.");
    }
    let failed = report.those(Outcome::Failed).count();
    let differs = report.those(Outcome::Differs).count();
    match (failed, differs) {
        (0, 0) => "This machine may accelerate, and applications do not notice.".to_owned(),
        (0, differs) => format!(
            "This machine may accelerate. What differs in {differs} cases is noticed by the workloads \
             that CULVERT_ACCELERATE names."
        ),
        (failed, _) => {
            format!("This machine does not accelerate: {failed} cases lose something.")
        }
    }
}
