//! Which file of a crate names which other file of the repository, as the parser sees it: `use` declarations and paths
//! in expressions, types and macros, followed through re-exports to the file that declares the name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree};

/// The crates whose files are read: their names in paths, and the folders of their sources.
const CRATES: [(&str, &str); 2] = [("dp_sidecar", "src"), ("dp_sidecar_protocol", "protocol/src")];

/// The path of a name: first the crate, then the modules.
type Name = Vec<String>;

/// A file and what it declares.
#[derive(Debug, Default)]
struct File {
    /// Relative to the repository.
    path: String,
    /// Names that `use` declarations bring in, as they were written.
    bindings: BTreeMap<String, Name>,
    /// Modules of which everything is brought in.
    globs: Vec<Name>,
    /// Names that are declared here.
    items: BTreeSet<String>,
    /// Paths of at least two segments, as they were written, with the first line of each.
    paths: BTreeMap<Name, usize>,
    /// Modules that are compiled for tests only.
    test_modules: BTreeSet<String>,
}

/// One file names another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Import {
    pub from: String,
    pub to: String,
    /// The first line of `from` that does.
    pub line: usize,
    /// Something that `to` declares is named, not only something that it passes on.
    pub declared: bool,
}

/// The files of the crates, by module.
#[derive(Debug, Default)]
pub(super) struct Sources {
    files: BTreeMap<Name, File>,
}

impl Sources {
    /// Reads the crates below `root`, without what is compiled for tests only.
    pub(super) fn read(root: &Path) -> Self {
        let mut files = Vec::new();
        for (_, folder) in CRATES {
            list(root, folder, &mut files);
        }
        let text = |path: &String| std::fs::read_to_string(root.join(path)).unwrap();
        Self::of(&files.iter().map(|path| (path.as_str(), text(path))).collect::<Vec<_>>())
    }

    /// The sources that consist of these files.
    pub(super) fn of(files: &[(&str, impl AsRef<str>)]) -> Self {
        let mut sources = Self::default();
        for (path, text) in files {
            if let Some(module) = module_of(path) {
                let parsed = syn::parse_file(text.as_ref()).unwrap_or_else(|error| panic!("{path}: {error}"));
                let mut reader =
                    Reader { file: File { path: (*path).to_owned(), ..File::default() }, depth: 0 };
                reader.visit_file(&parsed);
                sources.files.insert(module, reader.file);
            }
        }
        let for_tests: Vec<Name> = sources
            .files
            .iter()
            .flat_map(|(module, file)| file.test_modules.iter().map(|name| child(module, name)))
            .collect();
        sources.files.retain(|module, _| !for_tests.iter().any(|tests| module.starts_with(tests)));
        sources
    }

    /// The files, relative to the repository.
    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.files.values().map(|file| file.path.as_str())
    }

    /// Who names whom: one entry for each pair of files.
    pub(super) fn imports(&self) -> Vec<Import> {
        let mut found: BTreeMap<(&str, &str), Import> = BTreeMap::new();
        for (module, file) in &self.files {
            for (name, line) in &file.paths {
                let mut passed = Vec::new();
                self.resolve(module, name, &mut passed);
                let declares = passed.last().map(|file| file.path.as_str());
                for to in passed.iter().map(|file| file.path.as_str()).filter(|to| *to != file.path) {
                    let import = found.entry((&file.path, to)).or_insert_with(|| Import {
                        from: file.path.clone(),
                        to: to.to_owned(),
                        line: *line,
                        declared: false,
                    });
                    import.line = import.line.min(*line);
                    import.declared |= declares == Some(to);
                }
            }
        }
        found.into_values().collect()
    }

    /// Adds to `passed` the files that `name` in `module` leads through, and returns the one that declares it, which
    /// comes last. None for what belongs to other crates. The root of a crate only passes names on.
    fn resolve<'a>(
        &'a self,
        module: &[String],
        name: &[String],
        passed: &mut Vec<&'a File>,
    ) -> Option<&'a File> {
        let (first, rest) = name.split_first()?;
        // A name may be brought in from a module that brings it in, not for ever.
        if passed.len() > 16 || name.len() > 16 {
            return None;
        }
        let absolute = match first.as_str() {
            "crate" => child_of(&module[..1], rest),
            "self" => child_of(module, rest),
            "super" => {
                let up = name.iter().take_while(|segment| *segment == "super").count();
                child_of(&module[..module.len() - up], &name[up..])
            }
            first if CRATES.iter().any(|(name, _)| *name == first) => name.to_vec(),
            _ => {
                let local = child_of(module, name);
                if !self.files.contains_key(&local[..=module.len()]) {
                    // Brought in by a `use` of this file, unless that is the one that is looked at.
                    let binding = self.files.get(module)?.bindings.get(first)?;
                    if name.starts_with(binding) {
                        return None;
                    }
                    return self.resolve(module, &child_of(binding, rest), passed);
                }
                local
            }
        };
        // As deep as files go, then by what the last file declares or brings in.
        let deepest =
            (1..=absolute.len()).rev().find(|length| self.files.contains_key(&absolute[..*length]))?;
        let (module, rest) = absolute.split_at(deepest);
        let file = self.files.get(module)?;
        if module.len() > 1 {
            passed.push(file);
        }
        let Some(next) = rest.first().filter(|next| !file.items.contains(*next)) else {
            return Some(file);
        };
        if let Some(binding) = file.bindings.get(next) {
            return self.resolve(module, &child_of(binding, &rest[1..]), passed);
        }
        let brings_it_in = |glob: &&Name| {
            let target = self.resolve(module, glob, &mut Vec::new());
            target.is_some_and(|target| target.path != file.path && target.items.contains(next))
        };
        match file.globs.iter().find(brings_it_in) {
            Some(glob) => self.resolve(module, glob, passed),
            None => Some(file),
        }
    }
}

/// All sources below `folder`.
fn list(root: &Path, folder: &str, files: &mut Vec<String>) {
    for entry in std::fs::read_dir(root.join(folder)).unwrap() {
        let path = format!("{folder}/{}", entry.unwrap().file_name().to_string_lossy());
        if root.join(&path).is_dir() {
            list(root, &path, files);
        } else if path.ends_with(".rs") {
            files.push(path);
        }
    }
}

/// The module that a file holds; none for the entry point of a program.
fn module_of(path: &str) -> Option<Name> {
    let below = |(name, folder): (&str, &str)| {
        let path = path.strip_suffix(".rs")?.strip_prefix(folder)?.strip_prefix('/')?;
        let mut module =
            child_of(&[name.to_owned()], &path.split('/').map(str::to_owned).collect::<Vec<_>>());
        module.pop_if(|last| *last == "mod" || *last == "lib");
        Some(module)
    };
    CRATES.into_iter().find_map(below).filter(|_| path != "src/main.rs")
}

fn child(module: &[String], name: &str) -> Name {
    child_of(module, &[name.to_owned()])
}

fn child_of(module: &[String], rest: &[String]) -> Name {
    [module, rest].concat()
}

/// Gathers what a file declares and names.
struct Reader {
    file: File,
    /// Inline modules around the place that is read; `super` leads out of them first.
    depth: usize,
}

impl Reader {
    /// A single segment is a module that is brought in as a whole, or else a name of this file.
    fn name(&mut self, segments: Name, line: usize) {
        self.add(segments, line, 2);
    }

    fn add(&mut self, segments: Name, line: usize, at_least: usize) {
        let inside = segments.iter().take_while(|segment| *segment == "super").count().min(self.depth);
        let mut segments = segments[inside..].to_vec();
        if inside > 0 && segments.first().is_none_or(|segment| segment != "super") {
            segments.insert(0, "self".to_owned());
        }
        if segments.len() >= at_least {
            self.file.paths.entry(segments).or_insert(line);
        }
    }

    fn use_tree(&mut self, tree: &UseTree, before: &Name) {
        match tree {
            UseTree::Path(path) => self.use_tree(&path.tree, &child(before, &path.ident.to_string())),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.use_tree(tree, before)),
            UseTree::Glob(glob) => {
                if self.depth == 0 {
                    self.file.globs.push(before.clone());
                }
                self.add(before.clone(), glob.star_token.span.start().line, 1);
            }
            UseTree::Name(name) => self.bind(&name.ident.to_string(), &name.ident, before),
            UseTree::Rename(rename) => self.bind(&rename.rename.to_string(), &rename.ident, before),
        }
    }

    fn bind(&mut self, binding: &str, ident: &proc_macro2::Ident, before: &Name) {
        let line = ident.span().start().line;
        if ident == "self" {
            let module = before.last().cloned().unwrap_or_default();
            return self.bind_to(&module, before.clone(), line);
        }
        self.bind_to(binding, child(before, &ident.to_string()), line);
    }

    fn bind_to(&mut self, binding: &str, name: Name, line: usize) {
        if self.depth == 0 {
            self.file.bindings.insert(binding.to_owned(), name.clone());
        }
        self.name(name, line);
    }

    /// Paths in the tokens of a macro, which the parser leaves alone.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Name = Vec::new();
        let mut line = 0;
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.name(std::mem::take(&mut path), line);
                    }
                    line = ident.span().start().line;
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                other => {
                    self.name(std::mem::take(&mut path), line);
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.name(path, line);
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        let (attributes, name) = about(item);
        let for_tests = attributes.iter().filter_map(tests_only).collect::<Vec<_>>();
        if let Item::Mod(module) = item {
            let name = module.ident.to_string();
            if for_tests.contains(&Tests::Here) {
                self.file.test_modules.insert(name);
                return;
            }
            if module.content.is_some() {
                self.file.items.insert(name);
                self.depth += 1;
                visit::visit_item(self, item);
                self.depth -= 1;
            }
            return;
        }
        // What the feature adds to a module serves the fuzz targets and the tests, and is not part of the program.
        if !for_tests.is_empty() {
            return;
        }
        if self.depth == 0
            && let Some(name) = name
        {
            self.file.items.insert(name.to_string());
        }
        if let Item::Use(used) = item {
            self.use_tree(&used.tree, &Vec::new());
        }
        visit::visit_item(self, item);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !function.attrs.iter().any(|attribute| tests_only(attribute).is_some()) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let line = path.segments.first().map_or(0, |segment| segment.ident.span().start().line);
            self.name(path.segments.iter().map(|segment| segment.ident.to_string()).collect(), line);
        }
        visit::visit_path(self, path);
    }

    /// `pub(in ..)` uses nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        self.tokens(called.tokens.clone());
        visit::visit_macro(self, called);
    }
}

fn about(item: &Item) -> (&[Attribute], Option<&proc_macro2::Ident>) {
    match item {
        Item::Const(item) => (&item.attrs, Some(&item.ident)),
        Item::Enum(item) => (&item.attrs, Some(&item.ident)),
        Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
        Item::Impl(item) => (&item.attrs, None),
        Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
        Item::Mod(item) => (&item.attrs, Some(&item.ident)),
        Item::Static(item) => (&item.attrs, Some(&item.ident)),
        Item::Struct(item) => (&item.attrs, Some(&item.ident)),
        Item::Trait(item) => (&item.attrs, Some(&item.ident)),
        Item::Type(item) => (&item.attrs, Some(&item.ident)),
        Item::Union(item) => (&item.attrs, Some(&item.ident)),
        Item::Use(item) => (&item.attrs, None),
        _ => (&[], None),
    }
}

/// Who compiles an item that is not part of the program.
#[derive(PartialEq, Eq)]
enum Tests {
    /// The unit tests of its crate: `#[cfg(test)]`, `#[cfg(all(test, ..))]`.
    Here,
    /// The tests of the repository as well: `#[cfg(any(test, feature = "test-support"))]`.
    Everywhere,
}

fn tests_only(attribute: &Attribute) -> Option<Tests> {
    let syn::Meta::List(list) = &attribute.meta else { return None };
    let text = list.tokens.to_string().replace(' ', "");
    match text.as_str() {
        _ if !list.path.is_ident("cfg") => None,
        "test" => Some(Tests::Here),
        "any(test,feature=\"test-support\")" => Some(Tests::Everywhere),
        _ => text.starts_with("all(test").then_some(Tests::Here),
    }
}

/// Groups of files that name each other in a circle, each group sorted.
pub(super) fn circles(imports: &[Import]) -> Vec<Vec<&str>> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for import in imports.iter().filter(|import| import.declared) {
        next.entry(&import.from).or_default().insert(&import.to);
    }
    let reached: BTreeMap<&str, BTreeSet<&str>> = next
        .keys()
        .map(|start| {
            let mut seen = BTreeSet::new();
            let mut open = vec![*start];
            while let Some(file) = open.pop() {
                open.extend(next.get(file).into_iter().flatten().filter(|to| seen.insert(**to)));
            }
            (*start, seen)
        })
        .collect();
    let mut found: BTreeSet<Vec<&str>> = BTreeSet::new();
    for (file, from_here) in &reached {
        if from_here.contains(file) {
            let back = |other: &&&str| reached.get(**other).is_some_and(|seen| seen.contains(file));
            found.insert(from_here.iter().filter(back).copied().collect());
        }
    }
    found.into_iter().collect()
}
