//! NVIDIA's libraries before they are called. The bindings panic where a library or a symbol is missing, which ends a
//! program that is built with `panic = "abort"`.

use libloading::Library;

/// The library that the bindings will take, which go through the same names.
pub(super) fn library(names: &[&str]) -> Option<Library> {
    let mut files = names.iter().flat_map(|name| cudarc::get_lib_name_candidates(name));
    // SAFETY: what a library does when it is opened is NVIDIA's to answer for.
    files.find_map(|file| unsafe { Library::new(file) }.ok())
}

/// The first symbol that it lacks.
pub(super) fn missing<'a>(library: &Library, symbols: &[&'a str]) -> Option<&'a str> {
    // SAFETY: nothing is called.
    let has = |symbol: &str| unsafe { library.get::<unsafe extern "C" fn()>(symbol) }.is_ok();
    symbols.iter().copied().find(|symbol| !has(symbol))
}

/// The functions of a binding that sources call.
#[cfg(test)]
pub(super) fn called<'a>(sources: &[&'a str], binding: &str) -> std::collections::BTreeSet<&'a str> {
    let uses = sources.iter().flat_map(|source| source.split(binding).skip(1));
    uses.filter_map(|rest| rest.split_once('(').map(|(name, _)| name))
        .filter(|name| name.starts_with(char::is_lowercase))
        .filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
        .collect()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_lacks_a_symbol_is_found_out_without_a_call() {
        assert!(library(&["no-such-library"]).is_none());
        // SAFETY: the mathematics of C.
        let library = unsafe { Library::new("libm.so.6") }.unwrap();
        assert_eq!(missing(&library, &["cos", "sin"]), None);
        assert_eq!(missing(&library, &["cos", "cuInit", "cuDriverGetVersion"]), Some("cuInit"));
    }
}
