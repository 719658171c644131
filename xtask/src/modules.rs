//! A crate's files and which of them uses which, read from its source.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use proc_macro2::{TokenStream, TokenTree};
use syn::{Attribute, Item, Meta, UseTree, spanned::Spanned, visit::Visit};

/// The items that one file uses of another, with the line (from 1) of each one's first use.
pub(crate) type Items = BTreeMap<String, usize>;

/// The files that each file uses.
pub(crate) type Files = BTreeMap<PathBuf, BTreeMap<PathBuf, Items>>;

/// Reads the crate whose root file is `root`. A file uses another where a path in its code ends at an item that the other
/// defines: an item that a module re-exports is its own file's, and declaring a module uses nothing of it.
///
/// Code for tests alone (`#[cfg(test)]`, `#[test]`) is left out. Method calls name no file and are not seen.
///
/// # Errors
/// When a file cannot be read or is not Rust.
pub(crate) fn files(root: &Path) -> Result<Files> {
    let mut modules = Modules(Vec::new());
    modules.add_file(None, root, root.parent().context("a source file lies in a folder")?)?;
    Ok(modules.uses())
}

/// The circles among files: each a list of files that use one another, in order, directly or through others.
pub(crate) fn circles(files: &Files) -> Vec<Vec<&Path>> {
    let reached: BTreeMap<&Path, HashSet<&Path>> =
        files.keys().map(|file| (file.as_path(), reachable(files, file))).collect();
    let mut circles = Vec::new();
    let mut seen = HashSet::new();
    for (&file, others) in &reached {
        if !others.contains(file) || seen.contains(file) {
            continue;
        }
        let mut circle: Vec<&Path> =
            others.iter().copied().filter(|other| reached[other].contains(file)).collect();
        circle.sort();
        seen.extend(circle.iter().copied());
        circles.push(circle);
    }
    circles
}

/// The files that `file` uses, directly or through others.
fn reachable<'a>(files: &'a Files, file: &Path) -> HashSet<&'a Path> {
    let mut reached = HashSet::new();
    let mut next: Vec<&Path> = files[file].keys().map(PathBuf::as_path).collect();
    while let Some(file) = next.pop() {
        if reached.insert(file) {
            next.extend(files[file].keys().map(PathBuf::as_path));
        }
    }
    reached
}

/// One module: a file, or a `mod name { ... }` in one.
#[derive(Default)]
struct Module {
    file: PathBuf,
    parent: Option<usize>,
    children: HashMap<String, usize>,
    /// Names that the module defines itself.
    items: HashSet<String>,
    /// Names that `use` brings in, with their paths.
    imports: HashMap<String, Vec<String>>,
    /// The modules of `use module::*`.
    globs: Vec<Vec<String>>,
    /// All paths of the code with their lines, those of `use` included.
    paths: Vec<(Vec<String>, usize)>,
}

/// The end of a path.
enum Target {
    Module(usize),
    /// A module's item of this name.
    Item(usize, String),
    /// Something of another crate.
    Foreign,
}

/// The modules of a crate; the first is its root.
struct Modules(Vec<Module>);

impl Modules {
    /// Reads a file and all that it declares. Its modules' files lie in `folder`.
    fn add_file(&mut self, parent: Option<usize>, file: &Path, folder: &Path) -> Result<usize> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let parsed = syn::parse_file(&text).with_context(|| format!("cannot parse {}", file.display()))?;
        self.add(parent, file, folder, &parsed.items)
    }

    fn add(&mut self, parent: Option<usize>, file: &Path, folder: &Path, items: &[Item]) -> Result<usize> {
        let this = self.0.len();
        self.0.push(Module { file: file.to_owned(), parent, ..Module::default() });
        for item in items.iter().filter(|item| !is_test(attributes(item))) {
            let Item::Mod(module) = item else {
                if let Some(name) = name(item) {
                    self.0[this].items.insert(name);
                }
                self.0[this].visit_item(item);
                continue;
            };
            let name = module.ident.to_string();
            let inside = folder.join(&name);
            let child = if let Some((_, items)) = &module.content {
                self.add(Some(this), file, &inside, items)?
            } else {
                let beside = folder.join(format!("{name}.rs"));
                let path = [path_attribute(&module.attrs, file), Some(beside), Some(inside.join("mod.rs"))]
                    .into_iter()
                    .flatten()
                    .find(|path| path.exists());
                let path = path.with_context(|| format!("{}: no file of `mod {name}`", file.display()))?;
                self.add_file(Some(this), &path, &inside)?
            };
            self.0[this].children.insert(name, child);
        }
        Ok(this)
    }

    fn uses(&self) -> Files {
        let mut files = Files::new();
        for (index, module) in self.0.iter().enumerate() {
            let used = files.entry(module.file.clone()).or_default();
            for (path, line) in &module.paths {
                // A `macro_rules!` is in scope of more than its own module.
                let macros = path.last().filter(|name| name.ends_with('!')).and_then(|name| {
                    let module = self.0.iter().position(|module| module.items.contains(name))?;
                    Some(Target::Item(module, name.clone()))
                });
                if let Some(Target::Item(other, item)) =
                    macros.or_else(|| self.resolve(index, path, &mut HashSet::new()))
                    && self.0[other].file != module.file
                {
                    used.entry(self.0[other].file.clone()).or_default().entry(item).or_insert(*line);
                }
            }
        }
        files
    }

    /// Follows a path from `module`. None is a name of another crate, or a local one.
    fn resolve(&self, module: usize, path: &[String], seen: &mut HashSet<(usize, String)>) -> Option<Target> {
        let (first, mut rest) = path.split_first()?;
        let mut target = match first.as_str() {
            "crate" => Target::Module(0),
            "self" => Target::Module(module),
            "super" => Target::Module(self.0[module].parent?),
            name => self.lookup(module, name, seen)?,
        };
        while let (&Target::Module(module), Some((name, after))) = (&target, rest.split_first()) {
            target = match name.as_str() {
                "super" => Target::Module(self.0[module].parent?),
                // A macro may have defined what is not found.
                _ => self.lookup(module, name, seen).unwrap_or(Target::Item(module, name.clone())),
            };
            rest = after;
        }
        Some(target)
    }

    /// Looks up `name` in `module`.
    fn lookup(&self, module: usize, name: &str, seen: &mut HashSet<(usize, String)>) -> Option<Target> {
        let this = &self.0[module];
        if let Some(&child) = this.children.get(name) {
            return Some(Target::Module(child));
        }
        if this.items.contains(name) {
            return Some(Target::Item(module, name.to_owned()));
        }
        if !seen.insert((module, name.to_owned())) {
            return None;
        }
        if let Some(path) = this.imports.get(name) {
            return Some(self.resolve(module, path, seen).unwrap_or(Target::Foreign));
        }
        this.globs.iter().find_map(|glob| match self.resolve(module, glob, seen)? {
            Target::Module(other) => self.lookup(other, name, seen),
            Target::Item(..) | Target::Foreign => None,
        })
    }
}

impl Module {
    fn path(&mut self, path: Vec<String>, line: usize) {
        self.paths.push((path, line));
    }

    /// Takes in a tree of `use`, below `prefix`.
    fn import(&mut self, prefix: &[String], tree: &UseTree) {
        let below = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        let (path, name) = match tree {
            UseTree::Path(path) => return self.import(&below(&path.ident), &path.tree),
            UseTree::Group(group) => return group.items.iter().for_each(|tree| self.import(prefix, tree)),
            UseTree::Glob(_) => {
                self.globs.push(prefix.to_vec());
                return;
            }
            UseTree::Name(name) if name.ident == "self" => (prefix.to_vec(), prefix.last().cloned()),
            UseTree::Name(name) => (below(&name.ident), Some(name.ident.to_string())),
            UseTree::Rename(rename) if rename.ident == "self" => {
                (prefix.to_vec(), Some(rename.rename.to_string()))
            }
            UseTree::Rename(rename) => (below(&rename.ident), Some(rename.rename.to_string())),
        };
        self.path(path.clone(), tree.span().start().line);
        if let Some(name) = name.filter(|name| name != "_") {
            self.imports.insert(name, path);
        }
    }

    /// Takes in every path in the tokens of a macro.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut line = 0;
        // How many colons the path ends with.
        let mut colons = 0;
        for token in tokens {
            match &token {
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() && colons < 2 => {
                    colons += 1;
                    continue;
                }
                TokenTree::Ident(ident) if colons == 2 => path.push(ident.to_string()),
                _ => {
                    if !path.is_empty() {
                        self.path(std::mem::take(&mut path), line);
                    }
                    match token {
                        TokenTree::Ident(ident) => {
                            line = ident.span().start().line;
                            path.push(ident.to_string());
                        }
                        TokenTree::Group(group) => self.tokens(group.stream()),
                        TokenTree::Punct(_) | TokenTree::Literal(_) => {}
                    }
                }
            }
            colons = 0;
        }
        if !path.is_empty() {
            self.path(path, line);
        }
    }
}

impl<'ast> Visit<'ast> for Module {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test(attributes(item)) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.import(&[], &item.tree);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_test(&item.attrs) {
            syn::visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let segments = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.path(segments, path.span().start().line);
        }
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        let mut path: Vec<String> =
            item.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if let Some(name) = path.last_mut() {
            name.push('!');
        }
        self.path(path, item.path.span().start().line);
        self.tokens(item.tokens.clone());
    }

    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}

/// Tells if an attribute list makes code a part of tests alone.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("cfg") => of_tests(list.tokens.clone()),
        _ => false,
    })
}

/// A condition of `cfg` that holds in tests alone: `test`, or `all(...)` with it.
fn of_tests(condition: TokenStream) -> bool {
    let tokens: Vec<TokenTree> = condition.into_iter().collect();
    match &tokens[..] {
        [TokenTree::Ident(name)] => name == "test",
        [TokenTree::Ident(name), TokenTree::Group(group)] if name == "all" => {
            let parts: Vec<TokenTree> = group.stream().into_iter().collect();
            parts
                .split(|token| matches!(token, TokenTree::Punct(comma) if comma.as_char() == ','))
                .any(|part| of_tests(part.iter().cloned().collect()))
        }
        _ => false,
    }
}

/// The file that `#[path = "..."]` names, relative to that of `file`.
fn path_attribute(attributes: &[Attribute], file: &Path) -> Option<PathBuf> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(path), .. }) => {
                Some(file.with_file_name(path.value()))
            }
            _ => None,
        },
        _ => None,
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// The name that an item defines.
fn name(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => return Some(format!("{}!", item.ident.as_ref()?)),
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}
#[cfg(test)]
mod tests {
    use super::*;

    /// The uses among the files of a crate with these sources, each as `file:line item of file`, and its circles.
    fn read(sources: &[(&str, &str)]) -> (Vec<String>, Vec<Vec<String>>) {
        let folder = tempfile::tempdir().unwrap();
        for (file, text) in sources {
            let file = folder.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let files = files(&folder.path().join("lib.rs")).unwrap();
        let name = |file: &Path| file.strip_prefix(folder.path()).unwrap().display().to_string();
        let mut uses = Vec::new();
        for (file, used) in &files {
            for (other, items) in used {
                uses.extend(
                    items
                        .iter()
                        .map(|(item, line)| format!("{}:{line} {item} of {}", name(file), name(other))),
                );
            }
        }
        let circles =
            circles(&files).into_iter().map(|circle| circle.iter().map(|file| name(file)).collect());
        (uses, circles.collect())
    }

    #[test]
    fn a_path_leads_to_the_file_that_defines_its_item() {
        let (uses, circles) = read(&[
            ("lib.rs", "mod a;\nmod b;\npub use core::fmt as format;\n"),
            ("a/mod.rs", "mod one;\nmod two;\npub(crate) use one::{One, Other as Another};\n"),
            ("a/one.rs", "pub(crate) struct One;\npub(crate) struct Other;\nuse crate::format::Debug;"),
            ("a/two.rs", "use super::*;\nfn two() { Another; println!(\"{}\", crate::b::helper(1)) }\n"),
            (
                "b.rs",
                "pub(crate) fn helper(_: u32) {}\n#[cfg(all(test, unix))]\nmod tests { use crate::a::One; }\n",
            ),
        ]);
        assert_eq!(
            uses,
            [
                "a/mod.rs:3 One of a/one.rs",
                "a/mod.rs:3 Other of a/one.rs",
                "a/two.rs:2 Other of a/one.rs",
                "a/two.rs:2 helper of b.rs",
            ]
        );
        assert_eq!(circles, [[""; 0]; 0]);
    }

    #[test]
    fn files_that_use_each_other_are_a_circle_over_any_number_of_steps() {
        let (_, circles) = read(&[
            ("lib.rs", "mod a; mod b; mod c; mod d; macro_rules! seven { () => { 7 } }"),
            ("a.rs", "mod inner;\npub use inner::Inner;\npub struct A(crate::b::B);"),
            ("a/inner.rs", "pub struct Inner;"),
            ("b.rs", "pub struct B;\nimpl B { fn c(&self) { crate::c::c() } }"),
            ("c.rs", "pub fn c() { vec![crate::a::A::new()]; }"),
            ("d.rs", "fn d() -> u32 { let _ = crate::c::c(); seven!() }"),
        ]);
        assert_eq!(circles, [["a.rs", "b.rs", "c.rs"]]);
        // To use what a parent defines and re-export what a child defines is one as well; to declare the child is not.
        for (parent, expected) in [("pub use child::Child;", 1), ("", 0)] {
            let (_, circles) = read(&[
                ("lib.rs", "mod parent;"),
                ("parent.rs", &format!("mod child;\n{parent}\npub struct Parent;")),
                ("parent/child.rs", "pub struct Child(super::Parent);"),
            ]);
            assert_eq!(circles.len(), expected, "{parent}: {circles:?}");
        }
    }
}
