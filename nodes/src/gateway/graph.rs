//! `loci.v1.GraphService`.

use super::context;
use super::memory::info_of_all;
use crate::proto::v1::{self, graph_service_server};
use crate::reader::Reader;
use crate::writer::Writer;
use tonic::{Request, Response, Status};

pub struct GraphService {
    pub writer: Writer,
    pub reader: Reader,
}

#[tonic::async_trait]
impl graph_service_server::GraphService for GraphService {
    async fn upsert_edges(
        &self,
        request: Request<v1::UpsertEdgesRequest>,
    ) -> Result<Response<v1::UpsertEdgesResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        let written = self.writer.upsert_edges(&caller, request.into_inner(), deadline).await?;
        Ok(Response::new(v1::UpsertEdgesResponse { info: info_of_all(&written) }))
    }

    async fn delete_edges(
        &self,
        request: Request<v1::DeleteEdgesRequest>,
    ) -> Result<Response<v1::DeleteEdgesResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        let written = self.writer.delete_edges(&caller, request.into_inner(), deadline).await?;
        Ok(Response::new(v1::DeleteEdgesResponse { info: info_of_all(&written) }))
    }

    async fn traverse(
        &self,
        request: Request<v1::TraverseRequest>,
    ) -> Result<Response<v1::TraverseResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        Ok(Response::new(self.reader.traverse(&caller, request.into_inner(), deadline).await?))
    }
}
