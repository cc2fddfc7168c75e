//! Where the server listens, and to whom.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use clap::Args;

use super::parse::{count_usize, origins};

/// Where the server listens, and to whom.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct NetworkFlags {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 lets the system choose
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Listen on this Unix socket instead
    #[arg(long)]
    pub(crate) uds: Option<PathBuf>,
    /// Keys that open /v1; any one will do. VLLM_API_KEY adds one, --tenants theirs
    #[arg(long, num_args = 1.., hide_env_values = true)]
    api_key: Vec<String>,
    /// Further key, from the environment
    #[arg(long = "api-key-from-environment", env = "VLLM_API_KEY", hide = true, hide_env_values = true)]
    api_key_environment: Option<String>,
    /// Path under which a proxy publishes this server
    #[arg(long, default_value = "")]
    pub(crate) root_path: String,
    /// Origins that browsers may call from, as a JSON list
    #[arg(long, default_value = r#"["*"]"#, value_parser = origins)]
    pub(crate) allowed_origins: std::vec::Vec<String>,
    /// Largest request body in bytes
    #[arg(long, default_value_t = 8 << 20, value_parser = count_usize)]
    pub(crate) max_body_bytes: usize,
    /// Seconds that running requests may take after SIGTERM
    #[arg(long, default_value_t = 30)]
    pub(crate) shutdown_timeout: u64,
    /// Seconds between comments on a silent stream; 0 sends none
    #[arg(long, default_value_t = 0)]
    pub(crate) sse_keep_alive_interval: u64,
    /// Paths, comma separated, that are not written to the access log
    #[arg(long, value_delimiter = ',')]
    pub(crate) disable_access_log_for_endpoints: Vec<String>,
    /// Put X-Request-Id on every answer
    #[arg(long)]
    pub(crate) enable_request_id_headers: bool,
    /// Count running requests for /load
    #[arg(long)]
    pub(crate) enable_server_load_tracking: bool,
}

impl NetworkFlags {
    /// Why there is nobody listening, in one line.
    pub(crate) fn refused(&self, error: &io::Error) -> String {
        let place = self.uds.as_ref().map(|path| path.display().to_string());
        let other = match error.kind() {
            ErrorKind::AddrInUse if place.is_none() => "; --port takes another one, or 0 for any",
            _ => "",
        };
        let place = place.unwrap_or_else(|| format!("{}:{}", self.host, self.port));
        format!("cannot listen on {place}: {error}{other}")
    }

    /// The keys that open the API and are nobody's in particular.
    pub(crate) fn keys(&self) -> Vec<&str> {
        let environment = self.api_key_environment.iter();
        self.api_key.iter().chain(environment).map(String::as_str).filter(|key| !key.is_empty()).collect()
    }
}
