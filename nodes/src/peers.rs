//! Channels to the other nodes of the cluster: one connection per address, shared by everything that talks to it.

use crate::error::Error;
use crate::links::Links;
use crate::proto::internal::{Body, replica_client::ReplicaClient};
use bytes::Bytes;
use sim::net::Channel;
use sim::time::Duration;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use storage::codec;
use tonic::metadata::{Ascii, MetadataValue};

/// Names the cluster's secret in a call's metadata.
pub const SECRET_HEADER: &str = "x-loci-cluster-secret";
/// Largest message between nodes, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

#[derive(Clone)]
pub struct Peers {
    secret: MetadataValue<Ascii>,
    /// Where to connect to, where that is not the peer's address.
    via: Arc<BTreeMap<String, String>>,
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
    pub(crate) links: Links,
}

impl Peers {
    /// `secret` must be printable ASCII.
    pub fn new(secret: &str, via: BTreeMap<String, String>) -> io::Result<Peers> {
        let secret = secret.parse().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, "cluster_secret must be printable ASCII")
        })?;
        Ok(Peers { secret, via: Arc::new(via), channels: Arc::default(), links: Links::default() })
    }

    pub fn client(&self, addr: &str) -> io::Result<ReplicaClient<Channel>> {
        let mut channels = self.channels.lock().unwrap_or_else(|p| p.into_inner());
        let channel = match channels.get(addr) {
            Some(channel) => channel.clone(),
            None => {
                let channel = sim::net::connect(self.via.get(addr).map_or(addr, String::as_str))?;
                channels.insert(addr.to_string(), channel.clone());
                channel
            }
        };
        let client = ReplicaClient::new(channel);
        Ok(client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// Whether the node at an address answers in time; `version`: of the cluster map that it should read if it knows an older one.
    pub async fn is_there(&self, addr: &str, version: u64, within: Duration) -> bool {
        let Ok(mut client) = self.client(addr) else { return false };
        let body = Body { body: codec::encode(&version).into(), ..Body::default() };
        let asked = client.is_there(self.request(body, within));
        sim::time::timeout(within, asked).await.is_ok_and(|answer| answer.is_ok())
    }

    /// One call to the node at an address: the body of its answer.
    pub async fn ask<A: Future<Output = Result<tonic::Response<Body>, tonic::Status>>>(
        &self,
        addr: &str,
        body: Body,
        within: Duration,
        call: impl FnOnce(ReplicaClient<Channel>, tonic::Request<Body>) -> A,
    ) -> Result<Bytes, Error> {
        let client = self.client(addr).map_err(|e| Error::Internal(e.to_string()))?;
        match sim::time::timeout(within, call(client, self.request(body, within))).await {
            Ok(Ok(answer)) => Ok(answer.into_inner().body),
            Ok(Err(status)) => Err(Error::Unavailable(status.message().into())),
            Err(_) => Err(Error::Unavailable(format!("no answer within {within:?}"))),
        }
    }

    /// A request with the cluster's secret and a deadline.
    pub fn request<T>(&self, message: T, deadline: Duration) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(deadline);
        request.metadata_mut().insert(SECRET_HEADER, self.secret.clone());
        request
    }
}
