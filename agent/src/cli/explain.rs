//! An explanation as readable steps.

use super::answers::Explanation;

pub(super) fn text(explanation: &Explanation) -> String {
    let mut text = format!("{} → {}\n\n", explanation.source, explanation.destination);
    let wide = explanation.steps.iter().map(|step| step.decision.chars().count()).max();
    for (number, step) in (1..).zip(&explanation.steps) {
        let decision = format!("{:<width$}", step.decision, width = wide.unwrap_or(0));
        text.push_str(&format!("{number:>3}. {decision}  {}", step.result));
        if !step.because.is_empty() {
            let indent = " ".repeat(7 + wide.unwrap_or(0));
            text.push_str(&format!("\n{indent}because {}", step.because));
        }
        text.push('\n');
    }
    text.push_str(&format!("\nOutcome:   {}", explanation.outcome));
    let rule = explanation.rule.map(|rule| format!(", rule {rule}")).unwrap_or_default();
    match &explanation.policy {
        Some(policy) => text.push_str(&format!(" by policy {policy}{rule}\n")),
        None => text.push('\n'),
    }
    for (label, value) in [
        ("Path", &explanation.path),
        ("Via", &explanation.via),
        ("Authority", &explanation.authority),
    ] {
        if let Some(value) = value {
            text.push_str(&format!("{:<11}{value}\n", format!("{label}:")));
        }
    }
    text
}
