//! The command as its user sees it.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Command, Output};

fn generate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quayline-generate")).args(arguments).output().unwrap()
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let text = |seed| {
        let output = generate(&["--seed", seed, "--max-tokens", "24", "JULIET:\n"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn a_message_is_answered() {
    let output = generate(&["--chat", "--temperature", "0", "--max-tokens", "12", "Good morrow, cousin."]);
    assert!(output.status.success(), "{output:?}");
    assert!(!String::from_utf8(output.stdout).unwrap().trim().is_empty());
}

#[test]
fn without_a_gpu_there_is_an_error_or_the_cpu_aloud() {
    let run = |device| generate(&["--device", device, "--seed", "1", "--max-tokens", "3", "JULIET:\n"]);
    let (cpu, cuda, auto) = (run("cpu"), run("cuda"), run("auto"));
    assert!(cpu.status.success() && auto.status.success(), "{cpu:?} {auto:?}");
    if cuda.status.success() {
        // This machine has a GPU.
        assert_eq!(cuda.stdout, auto.stdout);
        return;
    }
    let message = String::from_utf8(cuda.stderr).unwrap();
    assert_eq!(cuda.status.code(), Some(1));
    assert!(
        message.starts_with("error: option device: no CUDA: ") && message.lines().count() == 1,
        "{message}"
    );
    assert_eq!(cpu.stdout, auto.stdout);
    assert!(String::from_utf8(auto.stderr).unwrap().contains("computing on the CPU"));
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    let cases: [(&[&str], &str); 4] = [
        (&["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (&["--temperature", "-1"], "temperature"),
        (&["--max-tokens", "0"], "max_tokens"),
        (&["--max-model-len", "99999999"], "max_model_len"),
    ];
    for (arguments, word) in cases {
        let output = generate(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.starts_with("error: ") && message.contains(word), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}
