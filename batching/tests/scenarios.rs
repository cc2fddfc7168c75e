//! Every file of `tests/scenarios` must say what the crate does. `REWRITE=1 cargo test` writes down what it
//! does now; the difference is what to review.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::path::{Path, PathBuf};

use quayline_batching::scenario::transcript;

#[test]
fn scenarios_say_what_happens() {
    #[expect(clippy::disallowed_methods, reason = "the test is told by its caller to rewrite the files")]
    let rewrite = std::env::var("REWRITE").is_ok();
    let files = files();
    assert!(files.len() > 20, "only {} scenarios were found", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let written = fs::read_to_string(&file).unwrap();
        let happens = transcript(&written);
        assert!(!happens.contains("broken:"), "{}: an invariant is broken\n{happens}", file.display());
        if rewrite {
            fs::write(&file, happens).unwrap();
        } else if happens != written {
            wrong.push(format!("{} says\n{written}\nbut this happens\n{happens}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The example in the module's documentation is one of the files.
#[test]
fn the_documented_example_is_a_scenario() {
    let source = include_str!("../src/scenario.rs");
    let example: Vec<&str> = source.lines().skip_while(|line| *line != "//! ```text").skip(1).collect();
    let example = example.iter().take_while(|line| **line != "//! ```");
    let text: String =
        example.map(|line| format!("{}\n", line.trim_start_matches("//!").trim_start_matches(' '))).collect();
    let happens = transcript(&text);
    let happens: String = happens.lines().map(|line| format!("{}\n", line.trim_start())).collect();
    assert_eq!(happens, text.lines().map(|line| format!("{}\n", line.trim_start())).collect::<String>());
}

#[test]
fn wrong_commands_are_answered() {
    for (command, answer) in [
        ("dance", "error: no command is called dance"),
        ("add", "error: add needs a name"),
        ("add A many", "error: many is not a number of tokens"),
        ("add A 4 prority=1", "error: add has no option prority"),
        ("batcher running_max=0", "error: running_max is 0: nobody could ever run"),
        ("memory blocks=4 block_tokens=0", "error: a block holds at least one token"),
        ("apply A", "error: step 0 is not in flight"),
    ] {
        assert_eq!(transcript(command), format!("{command}\n----\n{answer}\n"));
    }
}

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}
