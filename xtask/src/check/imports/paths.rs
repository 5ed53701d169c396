//! Every path that a file names, made absolute.

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use crate::check::source::is_test;

/// A path and where it is named. A path into the own crate begins with `crate`.
#[derive(Debug, PartialEq, Eq)]
pub struct Import {
    pub path: Vec<String>,
    pub line: usize,
}

impl Import {
    /// Whether it leads into the own crate.
    pub fn is_ours(&self) -> bool {
        self.path.first().is_some_and(|first| first == "crate")
    }
}

/// The paths that a file outside of its tests names, `module` being the one it is.
pub fn imports(file: &syn::File, module: &[String]) -> Vec<Import> {
    let mut paths = Paths { module: module.to_vec(), found: Vec::new() };
    paths.visit_file(file);
    paths.found
}

struct Paths {
    module: Vec<String>,
    found: Vec<Import>,
}

impl Paths {
    fn add(&mut self, path: &[String], line: usize) {
        let mut absolute = Vec::new();
        let mut own = self.module.clone();
        let mut rest = path;
        let mut relative = false;
        while let Some(first) = rest.first() {
            match first.as_str() {
                "crate" | "culvert_agent" => own.clear(),
                "super" => drop(own.pop()),
                "self" => {}
                _ => break,
            }
            relative = true;
            rest = rest.get(1..).unwrap_or_default();
        }
        if relative {
            absolute.push("crate".to_owned());
            absolute.extend(own);
        }
        absolute.extend_from_slice(rest);
        self.found.push(Import { path: absolute, line });
    }

    fn tree(&mut self, tree: &syn::UseTree, before: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(&path.tree, before);
                before.pop();
            }
            syn::UseTree::Name(name) => self.leaf(&name.ident, before),
            syn::UseTree::Rename(rename) => self.leaf(&rename.ident, before),
            syn::UseTree::Glob(glob) => self.add(before, glob.star_token.span.start().line),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.tree(tree, before);
                }
            }
        }
    }

    fn leaf(&mut self, name: &syn::Ident, before: &[String]) {
        let mut path = before.to_vec();
        path.push(name.to_string());
        self.add(&path, name.span().start().line);
    }

    /// Finds `a::b` in the arguments of a macro, which are no syntax tree.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let (mut line, mut colons) = (0, 0);
        for token in tokens {
            match token {
                TokenTree::Ident(name) => {
                    if colons != 2 {
                        self.end(&mut path, line);
                    }
                    line = name.span().start().line;
                    path.push(name.to_string());
                    colons = 0;
                }
                TokenTree::Punct(sign) if sign.as_char() == ':' => colons += 1,
                TokenTree::Group(group) => {
                    self.end(&mut path, line);
                    colons = 0;
                    self.tokens(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {
                    self.end(&mut path, line);
                    colons = 0;
                }
            }
        }
        self.end(&mut path, line);
    }

    fn end(&mut self, path: &mut Vec<String>, line: usize) {
        if path.len() > 1 {
            self.add(path, line);
        }
        path.clear();
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test(&item.attrs) {
            self.tree(&item.tree, &mut Vec::new());
        }
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test(&module.attrs) {
            self.module.push(module.ident.to_string());
            visit::visit_item_mod(self, module);
            self.module.pop();
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if let Some(first) = path.segments.first().filter(|_| names.len() > 1) {
            self.add(&names, first.ident.span().start().line);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, mac: &'ast syn::Macro) {
        self.tokens(mac.tokens.clone());
        visit::visit_macro(self, mac);
    }
}
