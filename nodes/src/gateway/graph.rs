//! `loci.v1.GraphService`: the protocol is there, the graph view is not yet, and every call says so.

use crate::error::Error;
use crate::proto::v1::{self, graph_service_server};
use tonic::{Request, Response, Status};

pub struct GraphService;

const MISSING: Error = Error::Unimplemented("the graph view");

#[tonic::async_trait]
impl graph_service_server::GraphService for GraphService {
    async fn upsert_edges(
        &self,
        _: Request<v1::UpsertEdgesRequest>,
    ) -> Result<Response<v1::UpsertEdgesResponse>, Status> {
        Err(MISSING.into())
    }

    async fn delete_edges(
        &self,
        _: Request<v1::DeleteEdgesRequest>,
    ) -> Result<Response<v1::DeleteEdgesResponse>, Status> {
        Err(MISSING.into())
    }

    async fn traverse(
        &self,
        _: Request<v1::TraverseRequest>,
    ) -> Result<Response<v1::TraverseResponse>, Status> {
        Err(MISSING.into())
    }
}
