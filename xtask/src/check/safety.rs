//! Every unsafe block and implementation says why it is sound.

use syn::visit::{self, Visit};

use super::Violation;
use super::source::{Source, lines};

pub fn check(source: &Source) -> Vec<Violation> {
    let mut blocks = Blocks(Vec::new());
    blocks.visit_file(&source.parsed);
    let text: Vec<&str> = source.text.lines().collect();
    let unsaid = blocks.0.into_iter().filter(|line| !is_explained(&text, *line));
    unsaid
        .map(|line| Violation {
            file: source.path.clone(),
            line,
            rule: "unsafe without a `// SAFETY:` comment before it".to_owned(),
        })
        .collect()
}

/// Looks upwards from the unsafe line to the beginning of its statement.
fn is_explained(text: &[&str], line: usize) -> bool {
    let above = text.get(..line.saturating_sub(1)).unwrap_or_default();
    for line in above.iter().rev().map(|line| line.trim()) {
        if line.starts_with("//") {
            if line.contains("SAFETY:") {
                return true;
            }
            continue;
        }
        let statement_ended = line.ends_with([';', '}']) || line.is_empty();
        let attribute = line.starts_with("#[");
        if statement_ended && !attribute {
            return false;
        }
    }
    false
}

struct Blocks(Vec<usize>);

impl<'ast> Visit<'ast> for Blocks {
    fn visit_expr_unsafe(&mut self, block: &'ast syn::ExprUnsafe) {
        self.0.push(lines(block).0);
        visit::visit_expr_unsafe(self, block);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if let Some(word) = &item.unsafety {
            self.0.push(lines(word).0);
        }
        visit::visit_item_impl(self, item);
    }
}

#[cfg(test)]
mod tests;
