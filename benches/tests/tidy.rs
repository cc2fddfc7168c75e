//! The rules of the house that the compiler does not know.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a file that cannot be read is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};

/// Crates that decide and do nothing else. A name takes effect when its folder appears.
const PURE: [&str; 5] = ["kv-cache", "batching", "scheduler-core", "quota", "routing"];

/// What a pure crate may depend on: an error derive, serde behind a feature, and hashes.
const PURE_DEPENDENCIES: [&str; 5] = ["thiserror", "serde", "sha2", "blake3", "xxhash-rust"];

const COLUMNS_MAX: usize = 120;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The folders named in the workspace's manifest.
fn members() -> Vec<String> {
    let manifest = read(&root().join("Cargo.toml"));
    let list = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

fn pure_members() -> Vec<String> {
    members().into_iter().filter(|member| PURE.contains(&member.as_str())).collect()
}

/// Every dependency of a manifest: its kind (`dependencies`, `dev-dependencies`, …), its name and the rest of its line.
fn dependencies(member: &str) -> Vec<(String, String, String)> {
    let manifest = read(&root().join(member).join("Cargo.toml"));
    let mut kind = String::new();
    let mut found = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            kind = section.rsplit('.').next().unwrap_or("").to_owned();
            if let Some((table, name)) = section.rsplit_once("dependencies.") {
                found.push((format!("{table}dependencies"), name.to_owned(), String::new()));
            }
        } else if kind.ends_with("dependencies") && !line.starts_with('#') {
            let Some((name, rest)) = line.split_once(['=', '.']) else { continue };
            found.push((kind.clone(), name.trim().to_owned(), rest.to_owned()));
        }
    }
    found
}

/// Every file of the repository whose name ends in one of `extensions`.
fn files(extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let foreign =
                (name.starts_with('.') && name != ".ci") || name == "target" || name == "__pycache__";
            if path.is_dir() && !foreign && !path.is_symlink() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| extensions.contains(&&*end.to_string_lossy())) {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(found.len() > 5, "the walk through {} found only {found:?}", root().display());
    found
}

/// Fails with all complaints at once.
fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

#[test]
fn pure_crates_and_kernels_depend_on_nothing_of_ours() {
    let mut alone = pure_members();
    alone.push("gpu-kernels".to_owned());
    let mut complaints = Vec::new();
    for member in alone {
        for (kind, name, rest) in dependencies(&member) {
            if name.starts_with("quayline") || rest.contains("quayline") || rest.contains("path =") {
                complaints
                    .push(format!("{member}: [{kind}] {name}: crates that decide do not know each other"));
            }
        }
    }
    none(&complaints);
}

#[test]
fn pure_crates_keep_to_few_dependencies() {
    let mut complaints = Vec::new();
    for member in pure_members() {
        for (kind, name, _) in dependencies(&member) {
            let normal = kind == "dependencies";
            if normal && !PURE_DEPENDENCIES.contains(&name.as_str()) {
                complaints.push(format!("{member}: {name} is not one of {PURE_DEPENDENCIES:?}"));
            }
        }
    }
    none(&complaints);
}

#[test]
fn pure_crates_forbid_unsafe_code_and_lift_no_lint() {
    for member in pure_members() {
        let folder = root().join(&member);
        assert!(read(&folder.join("src/lib.rs")).contains("#![forbid(unsafe_code)]"), "{member}/src/lib.rs");
        assert!(!folder.join("clippy.toml").exists(), "{member} has a clippy.toml of its own");
    }
}

#[test]
fn every_crate_tells_its_story_in_a_readme() {
    let mut complaints = Vec::new();
    for member in members() {
        let folder = root().join(&member);
        if !folder.join("README.md").exists() {
            complaints.push(format!("{member} has no README.md"));
        }
        let entry = ["src/lib.rs", "src/main.rs"]
            .map(|name| folder.join(name))
            .into_iter()
            .find(|path| path.exists());
        let text = read(&entry.unwrap_or_else(|| panic!("{member} has neither a library nor a program")));
        if !text.contains("#![doc = include_str!(\"../README.md\")]") {
            complaints.push(format!("{member}: its documentation is not its README.md"));
        }
    }
    none(&complaints);
}

#[test]
fn every_crate_takes_the_workspace_lints() {
    for member in members() {
        let manifest = read(&root().join(&member).join("Cargo.toml"));
        assert!(manifest.contains("[lints]\nworkspace = true"), "{member}/Cargo.toml");
    }
}

#[test]
fn lines_fit_a_screen() {
    let mut complaints = Vec::new();
    for path in files(&["rs"]) {
        for (index, line) in read(&path).lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX && !cannot_be_broken(line) {
                complaints.push(format!("{}:{}: {columns} columns", shown(&path), index + 1));
            }
        }
    }
    none(&complaints);
}

/// A row of a table in documentation, or a line whose text is the point.
fn cannot_be_broken(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("//! |") || line.starts_with("/// |") || line.contains('"')
}

#[test]
fn nothing_is_left_for_later_and_no_machine_is_named() {
    // Written in two halves, so that this file does not find itself.
    let forbidden = [
        ["TO", "DO"],
        ["FIX", "ME"],
        ["XX", "X:"],
        ["/ho", "me/"],
        ["/ro", "ot/"],
        ["/Us", "ers/"],
        ["/wo", "rk/"],
        ["/op", "t/"],
        ["C:", "\\"],
    ]
    .map(|halves| halves.concat());
    let mut complaints = Vec::new();
    for path in files(&["rs", "md", "toml", "sh", "py", "html", "js", "css", "yaml", "yml"]) {
        for (index, line) in read(&path).lines().enumerate() {
            for word in forbidden.iter().filter(|word| line.contains(word.as_str())) {
                complaints.push(format!("{}:{}: {word}", shown(&path), index + 1));
            }
        }
    }
    none(&complaints);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut complaints = Vec::new();
    for path in files(&["md"]) {
        let folder = path.parent().unwrap();
        for link in links(&prose(&read(&path))) {
            if !folder.join(&link).exists() {
                complaints.push(format!("{}: ({link})", shown(&path)));
            }
        }
    }
    none(&complaints);
}

#[test]
fn files_named_in_documents_exist() {
    let mut roots = vec![root()];
    roots.extend(members().iter().map(|member| root().join(member)));
    let mut complaints = Vec::new();
    for path in files(&["md"]) {
        let folder = path.parent().unwrap();
        for name in named_files(&prose(&read(&path))) {
            let known = folder.join(&name).exists() || roots.iter().any(|root| root.join(&name).exists());
            if !known {
                complaints.push(format!("{}: `{name}`", shown(&path)));
            }
        }
    }
    none(&complaints);
}

/// A document without its fenced blocks: those hold commands and code.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// The targets of `[text](target)` that are files, without their fragment.
fn links(text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    let local = targets.filter(|target| !target.contains("://") && !target.starts_with(['#', '<']));
    local
        .map(|target| target.split('#').next().unwrap_or("").to_owned())
        .filter(|target| !target.is_empty())
        .collect()
}

/// Code spans that look like a path with an ending that only files of a repository have.
fn named_files(text: &str) -> Vec<String> {
    let spans = text.split('`').skip(1).step_by(2);
    let plain = |span: &&str| span.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
    let ending = |span: &&str| [".rs", ".md", ".py", ".sh", ".toml"].iter().any(|end| span.ends_with(end));
    let inside = |span: &&str| span.contains('/') && !span.starts_with(['/', '.']);
    spans.filter(plain).filter(ending).filter(inside).map(str::to_owned).collect()
}

#[test]
fn links_and_names_are_found() {
    let text = "See [a](b/c.md#part), [d](https://e), [f](#g) and `src/x.rs`, `*.rs`, `y.rs`, `../z/w.py`.";
    assert_eq!(links(text), ["b/c.md"]);
    assert_eq!(named_files(text), ["src/x.rs"]);
    assert_eq!(prose("a ```x``` b"), "a  b");
}
