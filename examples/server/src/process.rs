//! What the operating system knows about this process, and how many files it may open.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// One reading.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process {
    pub(crate) resident_bytes: u64,
    pub(crate) virtual_bytes: u64,
    pub(crate) cpu_seconds: f64,
    pub(crate) open_files: u64,
    pub(crate) files_max: u64,
}

/// Reads `/proc`; `None` where there is none.
pub(crate) fn read() -> Option<Process> {
    let page = rustix::param::page_size() as u64;
    let memory = fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = memory.split_ascii_whitespace().map_while(|field| field.parse::<u64>().ok());
    let (virtual_bytes, resident_bytes) = (pages.next()? * page, pages.next()? * page);
    // The command's name is in parentheses and may hold blanks; user and system time are 11 fields further.
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut times = after_name.split_ascii_whitespace().skip(11).map_while(|field| field.parse::<u64>().ok());
    let ticks = times.next()? + times.next()?;
    Some(Process {
        resident_bytes,
        virtual_bytes,
        cpu_seconds: ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
        open_files: fs::read_dir("/proc/self/fd").ok()?.count() as u64,
        files_max: files_max(),
    })
}

/// Raises the limit of open files as far as it goes, and returns it. Each connection is one.
pub(crate) fn raise_files_max() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // A failure leaves the limit as it was; the number of connections follows whatever it is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    files_max()
}

/// Gives memory that is free inside the allocator back to the system. glibc does so by itself only with what lies at
/// the end of its heaps. Cost: milliseconds per hundred megabytes, during which others wait to allocate.
pub(crate) fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "there is no other way to tell glibc")]
    // SAFETY: it may be called at any time from any thread and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn files_max() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_plausible() {
        let process = read().expect("Linux has /proc");
        assert!(process.resident_bytes > 1 << 20 && process.virtual_bytes >= process.resident_bytes);
        assert!(process.open_files >= 3 && process.files_max >= process.open_files);
    }
}
