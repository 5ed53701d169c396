//! Sizes of files and functions, and the form of modules.

use syn::visit::{self, Visit};

use super::Violation;
use super::source::{Source, is_test, lines};

/// Lines of a file without its tests.
const FILE: usize = 500;
/// Lines of a function.
const FUNCTION: usize = 80;

pub fn check(source: &Source) -> Vec<Violation> {
    let mut found = Found { source, violations: Vec::new() };
    found.module();
    if source.tests {
        found.ignored_tests();
        return found.violations;
    }
    let tests: usize = source.parsed.items.iter().map(test_lines).sum();
    let length = source.text.lines().count() - tests;
    if length > FILE {
        found.add(1, format!("the file has {length} lines without its tests, more than {FILE}"));
    }
    found.visit_file(&source.parsed);
    found.violations
}

fn test_lines(item: &syn::Item) -> usize {
    match item {
        syn::Item::Mod(module) if is_test(&module.attrs) => {
            let (first, last) = lines(module);
            last - first + 1
        }
        _ => 0,
    }
}

struct Found<'s> {
    source: &'s Source,
    violations: Vec<Violation>,
}

impl Found<'_> {
    fn add(&mut self, line: usize, rule: String) {
        self.violations.push(Violation { file: self.source.path.clone(), line, rule });
    }

    fn module(&mut self) {
        if self.source.path.file_name().is_some_and(|name| name == "mod.rs") {
            self.add(1, "modules are `foo.rs` beside `foo/`, not `foo/mod.rs`".to_owned());
        }
        let documented = self.source.parsed.attrs.iter().any(|a| a.path().is_ident("doc"));
        let is_module = self.source.module.is_some() && !self.source.tests;
        if is_module && !documented {
            self.add(1, "a module starts with a sentence (`//!`)".to_owned());
        }
    }

    fn ignored_tests(&mut self) {
        for (index, line) in self.source.text.lines().enumerate() {
            if line.trim_start().starts_with("#[ignore") {
                self.add(index + 1, "tests are not ignored".to_owned());
            }
        }
    }

    fn function(&mut self, name: &syn::Ident, block: &syn::Block) {
        let (first, last) = (name.span().start().line, lines(block).1);
        let length = last + 1 - first;
        if length > FUNCTION {
            self.add(first, format!("`{name}` has {length} lines, more than {FUNCTION}"));
        }
    }
}

impl<'ast> Visit<'ast> for Found<'_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        if !is_test(&function.attrs) {
            self.function(&function.sig.ident, &function.block);
            visit::visit_item_fn(self, function);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.function(&function.sig.ident, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(block) = &function.default {
            self.function(&function.sig.ident, block);
        }
        visit::visit_trait_item_fn(self, function);
    }
}

#[cfg(test)]
mod tests;
