//! What the operating system says about a process.

/// CPU seconds that this process has used, user and system; `None` where `/proc` does not exist.
#[must_use]
pub fn own_cpu_seconds() -> Option<f64> {
    cpu_seconds(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

/// CPU seconds that process `pid` has used.
#[must_use]
pub fn cpu_seconds_of(pid: u32) -> Option<f64> {
    cpu_seconds(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads fields 14 and 15 of `/proc/PID/stat`, in ticks; Linux shows them to programs at 100 per second on
/// every machine.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let after_name = stat.rsplit_once(')')?.1;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some((f64::from(user) + f64::from(system)) / 100.0)
}

/// Memory of process `pid` that is in RAM now.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Serialize)]
pub struct Resident {
    /// All of it.
    pub bytes: u64,
    /// The part that belongs to no file: what the program allocated.
    pub anonymous_bytes: u64,
}

/// Asks for the resident memory of `pid`; `None` when there is no such process or no `/proc`.
#[must_use]
pub fn resident(pid: u32) -> Option<Resident> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Resident { bytes: kibibytes(&status, "VmRSS:")?, anonymous_bytes: kibibytes(&status, "RssAnon:")? })
}

fn kibibytes(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let count: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(count * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_shift_the_fields() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 100 1000 10";
        assert_eq!(cpu_seconds(stat), Some(3.0));
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(kibibytes("Name:\tx\nVmRSS:\t   12 kB\nRssAnon:\t 8 kB\n", "VmRSS:"), Some(12_288));
        assert_eq!(kibibytes("Name:\tx\n", "VmRSS:"), None);
    }
}
