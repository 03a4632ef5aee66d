//! How a command reaches a service: flags, then environment, then what `loci up` left in the data directory. Of several addresses the first one that answers is used.

use super::Failure;
use super::endpoints::Endpoints;
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
    /// The service's address, host:port; several, with commas between them, are tried in turn.
    #[arg(long = "addr", env = "LOCI_ADDR", global = true, value_delimiter = ',')]
    addrs: Vec<String>,
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
    endpoints: Endpoints,
    bearer: MetadataValue<Ascii>,
    pub addr: String,
}

impl To {
    pub fn connect(&self) -> Result<Client, Failure> {
        let (addrs, key) = self.found()?;
        let key = key.ok_or_else(|| self.missing("key"))?;
        Client::to(&addrs, &key)
    }

    /// The gateways, each by itself, with its address. No key is needed for what they say of regions.
    pub fn gateways(&self) -> Result<Vec<(String, Channel)>, Failure> {
        let (addrs, _) = self.found()?;
        let each = Endpoints::new(&addrs, DEADLINE)?.each().to_vec();
        Ok(addrs.into_iter().zip(each).collect())
    }

    fn missing(&self, what: &str) -> Failure {
        let found = format!("no {} either", self.data.join(CLIENT_FILE).display());
        Failure(format!("no {what}: start a service here with `loci up`, or give --{what} ({found})"))
    }

    /// The addresses, and the key if there is one.
    fn found(&self) -> Result<(Vec<String>, Option<String>), Failure> {
        let path = self.data.join(CLIENT_FILE);
        let file: Option<ClientFile> = match std::fs::read_to_string(&path) {
            Ok(text) => Some(toml::from_str(&text).map_err(|e| Failure(format!("{}: {e}", path.display())))?),
            Err(_) => None,
        };
        let (file_addr, file_key) = file.map_or((None, None), |f| (Some(f.addr), Some(f.key)));
        let given = self.addrs.iter().filter(|addr| !addr.is_empty()).cloned();
        let mut addrs: Vec<String> = given.collect();
        if addrs.is_empty() {
            addrs.push(file_addr.ok_or_else(|| self.missing("addr"))?);
        }
        Ok((addrs, self.key.clone().or(file_key)))
    }
}

impl Client {
    pub fn new(addr: &str, key: &str) -> Result<Client, Failure> {
        Client::to(&[addr.into()], key)
    }

    /// Of several gateways the one that answers.
    pub fn to(addrs: &[String], key: &str) -> Result<Client, Failure> {
        let bearer =
            format!("Bearer {key}").parse().map_err(|_| Failure("the key holds odd characters".into()))?;
        Ok(Client { endpoints: Endpoints::new(addrs, DEADLINE)?, bearer, addr: addrs.join(", ") })
    }

    /// A write's idempotency key: the caller's, or one of its own where another gateway may be sent the write again.
    pub fn write_key(&self, given: String) -> String {
        match given.is_empty() && self.endpoints.are_several() {
            true => sim::rand::uuid_v7().simple().to_string(),
            false => given,
        }
    }

    pub fn memories(&self) -> MemoryServiceClient<Endpoints> {
        let client = MemoryServiceClient::new(self.endpoints.clone());
        client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn graph(&self) -> GraphServiceClient<Endpoints> {
        let client = GraphServiceClient::new(self.endpoints.clone());
        client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn admin(&self) -> AdminServiceClient<Endpoints> {
        AdminServiceClient::new(self.endpoints.clone())
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
