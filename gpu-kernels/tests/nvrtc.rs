//! Every kernel compiles for every architecture without spills, wherever NVIDIA's run-time compiler is at hand.
//!
//! `scripts/nvrtc-check` fetches the compiler once; after that this test finds it. All files take minutes, so it
//! compiles a few here, and all of them with `QUAYLINE_NVRTC_ALL=1`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test: a panic is the report")]

use std::path::Path;
use std::process::Command;

#[test]
fn kernels_compile_for_gpus() {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../nvrtc/venv");
    if !venv.join("ready-linker").exists() {
        eprintln!("skipped: no NVRTC; gpu-kernels/scripts/nvrtc-check fetches it");
        return;
    }
    let mut check = Command::new(venv.join("bin/python"));
    check.arg(crate_root.join("scripts/nvrtc_check.py"));
    if std::env::var_os("QUAYLINE_NVRTC_ALL").is_none() {
        check.args(["norm", "merge", "copy", "gather", "hopper_attention_bf16"]);
    }
    let output = check.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}
