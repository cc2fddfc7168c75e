//! The server that is asked, by its address.

use std::net::{SocketAddr, ToSocketAddrs};

use hyper::Request;

use super::Failure;

/// The server that is asked.
#[derive(Clone, Debug)]
pub struct Target {
    pub(super) address: SocketAddr,
    authority: String,
    base: String,
    key: Option<String>,
}

/// Why an address cannot be a target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The address does not have the form `http://host:port[/base]`.
    #[error("{0:?} is not of the form http://host:port[/base]")]
    Form(String),
    /// The host has no address.
    #[error("{host} cannot be resolved: {source}")]
    Unknown {
        /// The host and port.
        host: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The host is not this machine.
    #[error("{0} is not this machine; load on other machines needs --allow-remote")]
    Remote(SocketAddr),
}

impl Target {
    /// Reads `http://host:port[/base]`. Hosts other than this machine are refused unless `allow_remote`.
    ///
    /// # Errors
    /// When the address has another form, cannot be resolved, or is remote and that was not allowed.
    pub fn parse(url: &str, key: Option<String>, allow_remote: bool) -> Result<Self, TargetError> {
        let form = || TargetError::Form(url.to_owned());
        let rest = url.strip_prefix("http://").ok_or_else(form)?;
        let (authority, base) = rest.split_once('/').unwrap_or((rest, ""));
        let host = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
        if authority.is_empty() || authority.contains('@') {
            return Err(form());
        }
        let address = host
            .to_socket_addrs()
            .and_then(|mut all| all.next().ok_or_else(|| std::io::ErrorKind::NotFound.into()))
            .map_err(|source| TargetError::Unknown { host, source })?;
        if !address.ip().is_loopback() && !allow_remote {
            return Err(TargetError::Remote(address));
        }
        let base = base.trim_end_matches('/');
        let base = if base.is_empty() { String::new() } else { format!("/{base}") };
        Ok(Self { address, authority: authority.to_owned(), base, key })
    }

    /// A request to it.
    pub(super) fn request(&self, method: &str, path: &str, body: String) -> Result<Request<String>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("host", &self.authority)
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.body(body).map_err(|_| Failure::Connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_a_target_unless_allowed() {
        assert!(Target::parse("http://127.0.0.1:8000", None, false).is_ok());
        assert!(
            Target::parse("http://127.9.0.1:8000/base/", None, false)
                .is_ok_and(|target| target.base == "/base")
        );
        assert!(Target::parse("http://[::1]:8000", None, false).is_ok());
        assert!(matches!(Target::parse("http://10.0.0.1:8000", None, false), Err(TargetError::Remote(_))));
        assert!(Target::parse("http://10.0.0.1:8000", None, true).is_ok());
        assert!(matches!(Target::parse("https://127.0.0.1", None, false), Err(TargetError::Form(_))));
        assert!(matches!(Target::parse("http://", None, false), Err(TargetError::Form(_))));
    }
}
