//! Addresses in ZeroMQ's spelling: `tcp://*:5557` is opened here, `tcp://host:5557` is where somebody listens.

use std::fmt;
use std::io;

use serde::Deserialize;
use tokio::net::TcpListener;

/// Where events go.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Endpoint {
    host: String,
    port: u16,
}

/// How one gets to subscribers.
#[derive(Debug)]
pub(super) enum Door {
    /// They come.
    Listener(TcpListener),
    /// One of them is at this address, and is called on.
    Peer(String),
}

impl Door {
    /// Where they come, if they do.
    pub(super) fn listener(&self) -> Option<&TcpListener> {
        match self {
            Door::Listener(listener) => Some(listener),
            Door::Peer(_) => None,
        }
    }
}

impl Endpoint {
    /// On every address of this machine.
    pub(super) fn bound(port: u16) -> Self {
        Self { host: "*".to_owned(), port }
    }

    /// That of one of several servers of a model. Port 0 leaves the choice to the system.
    pub(super) fn of_rank(&self, rank: u16) -> Self {
        let port = if self.port == 0 { 0 } else { self.port.saturating_add(rank) };
        Self { host: self.host.clone(), port }
    }

    /// As vLLM does: a `*` or `::` is opened, any other address is called on.
    ///
    /// # Errors
    /// What the system says.
    pub(super) async fn open(&self) -> io::Result<Door> {
        if self.host.contains('*') || self.host.contains("::") {
            return self.bind().await.map(Door::Listener);
        }
        Ok(Door::Peer(format!("{}:{}", self.host, self.port)))
    }

    /// Opens it.
    ///
    /// # Errors
    /// What the system says.
    pub(super) async fn bind(&self) -> io::Result<TcpListener> {
        let host = if self.host == "*" { "0.0.0.0" } else { &self.host };
        TcpListener::bind(format!("{host}:{}", self.port)).await
    }
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parts = text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':'));
        match parts.map(|(host, port)| (host, port.parse())) {
            Some((host, Ok(port))) if !host.is_empty() => Ok(Self { host: host.to_owned(), port }),
            _ => Err(format!("{text:?} is no place for events; tcp://*:5557 and tcp://HOST:5557 are")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tcp://{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(text: &str) -> Result<Endpoint, String> {
        Endpoint::try_from(text.to_owned())
    }

    #[tokio::test]
    async fn stars_are_opened_and_names_are_called_on() {
        for here in ["tcp://*:0", "tcp://[::]:0"] {
            assert!(endpoint(here).unwrap().open().await.unwrap().listener().is_some(), "{here}");
        }
        let there = endpoint("tcp://indexer:5557").unwrap().open().await.unwrap();
        assert!(matches!(there, Door::Peer(address) if address == "indexer:5557"));
    }

    #[test]
    fn every_rank_has_its_port() {
        let shown = |text: &str, rank| endpoint(text).unwrap().of_rank(rank).to_string();
        assert_eq!(shown("tcp://*:5557", 0), "tcp://*:5557");
        assert_eq!(shown("tcp://*:5557", 3), "tcp://*:5560");
        assert_eq!(shown("tcp://*:0", 3), "tcp://*:0");
    }

    #[test]
    fn other_places_are_refused_by_name() {
        for text in
            ["ipc:///run/events", "inproc://events", "tcp://*", "tcp://*:70000", "tcp://:1", "*:5557", ""]
        {
            assert!(endpoint(text).unwrap_err().contains(text), "{text}");
        }
    }
}
