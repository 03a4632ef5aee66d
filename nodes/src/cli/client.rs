//! How a command reaches a service: flags, then environment, then what `loci up` left in the data directory.

use super::Failure;
use clap::Args;
use nodes::limits::MESSAGE_BYTES_MAX;
use nodes::proto::v1::admin_service_client::AdminServiceClient;
use nodes::proto::v1::graph_service_client::GraphServiceClient;
use nodes::proto::v1::memory_service_client::MemoryServiceClient;
use serde::{Deserialize, Serialize};
use sim::net::Channel;
use sim::time::Duration;
use std::path::PathBuf;
use tonic::metadata::{Ascii, MetadataValue};

/// What `loci up` writes for commands on the same machine.
pub const CLIENT_FILE: &str = "client.toml";
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Args, Clone)]
pub struct To {
    /// The service's address, host:port.
    #[arg(long, env = "LOCI_ADDR", global = true)]
    addr: Option<String>,
    /// An API key.
    #[arg(long, env = "LOCI_KEY", global = true, hide_env_values = true)]
    key: Option<String>,
    /// The data directory of a local service.
    #[arg(long, default_value = "./loci-data", global = true)]
    pub data: PathBuf,
    /// JSON lines instead of text for people.
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Serialize, Deserialize)]
pub struct ClientFile {
    pub addr: String,
    pub key: String,
}

/// A connection with a key.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
    bearer: MetadataValue<Ascii>,
    pub addr: String,
}

impl To {
    pub fn connect(&self) -> Result<Client, Failure> {
        let path = self.data.join(CLIENT_FILE);
        let file: Option<ClientFile> = match std::fs::read_to_string(&path) {
            Ok(text) => Some(toml::from_str(&text).map_err(|e| Failure(format!("{}: {e}", path.display())))?),
            Err(_) => None,
        };
        let missing = |what: &str| {
            let found = format!("no {} either", path.display());
            Failure(format!("no {what}: start a service here with `loci up`, or give --{what} ({found})"))
        };
        let (file_addr, file_key) = file.map_or((None, None), |f| (Some(f.addr), Some(f.key)));
        let addr = self.addr.clone().or(file_addr).ok_or_else(|| missing("addr"))?;
        let key = self.key.clone().or(file_key).ok_or_else(|| missing("key"))?;
        Client::new(&addr, &key)
    }
}

impl Client {
    pub fn new(addr: &str, key: &str) -> Result<Client, Failure> {
        let bearer =
            format!("Bearer {key}").parse().map_err(|_| Failure("the key holds odd characters".into()))?;
        Ok(Client { channel: sim::net::connect(addr)?, bearer, addr: addr.into() })
    }

    pub fn memories(&self) -> MemoryServiceClient<Channel> {
        let client = MemoryServiceClient::new(self.channel.clone());
        client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn graph(&self) -> GraphServiceClient<Channel> {
        let client = GraphServiceClient::new(self.channel.clone());
        client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone())
    }

    /// A request with the key and a deadline.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(DEADLINE);
        request.metadata_mut().insert("authorization", self.bearer.clone());
        request
    }

    /// What a status means to a person.
    pub fn explain(&self, status: tonic::Status) -> Failure {
        if status.code() == tonic::Code::Unavailable && nodes::error::reason(&status).is_none() {
            return Failure(format!(
                "no service answers at {} ({}); start one with `loci up`",
                self.addr,
                status.message()
            ));
        }
        Failure(status.message().to_string())
    }
}
