//! Every file in `scenarios` says what the cache answers. `REWRITE=1` writes what it answers now; the diff
//! is for a person to judge.

use std::fs;
use std::path::Path;

use quayline_kv_cache::scenario::transcript;

#[test]
#[expect(clippy::disallowed_methods, reason = "a test may be asked by its environment to rewrite the files")]
fn scenarios_answer_as_written() {
    let rewrite = std::env::var("REWRITE").is_ok_and(|value| value == "1");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no scenario in {}", folder.display());
    let mut wrong = Vec::new();
    for path in paths {
        let written = fs::read_to_string(&path).unwrap();
        let answered = transcript(&written);
        assert!(!answered.contains("VIOLATION"), "{}:\n{answered}", path.display());
        if written == answered {
            continue;
        }
        if rewrite {
            fs::write(&path, &answered).unwrap();
        } else {
            wrong.push(format!("{}\n{}", path.display(), first_difference(&written, &answered)));
        }
    }
    assert!(wrong.is_empty(), "not as written:\n{}", wrong.join("\n"));
}

fn first_difference(written: &str, answered: &str) -> String {
    let (mut written, mut answered) = (written.lines(), answered.lines());
    for number in 1.. {
        match (written.next(), answered.next()) {
            (Some(a), Some(b)) if a == b => continue,
            (None, None) => break,
            (a, b) => return format!("  line {number}\n  written:  {}\n  answered: {}", show(a), show(b)),
        }
    }
    "  only the last line's end differs".to_owned()
}

fn show(line: Option<&str>) -> &str {
    line.unwrap_or("(the file ends)")
}
