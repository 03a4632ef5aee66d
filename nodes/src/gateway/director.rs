//! `loci.v1.DirectorService`: which region to talk to, for clients that know several gateways, for load balancers and for name servers.
//!
//! Every node answers with the map that it has, which may be old: a node that is cut off does not know what was decided without it. So an answer says its epoch
//! and its map's version, and how long ago the node heard of the newest one from whoever led the control group then. A client that has seen a greater
//! epoch, or in the same epoch a greater version, goes by that. Nothing that must be right depends on it: a region without the right to write refuses.

use super::About;
use super::admin::{change_of, state_of};
use crate::control::Heard;
use crate::control::map::{ClusterMap, Gateway, NodeEntry, NodeId};
use crate::proto::v1::{self, director_service_server};
use std::sync::Arc;
use tonic::{Request, Response, Status};

pub struct DirectorService {
    pub about: Arc<About>,
}

#[tonic::async_trait]
impl director_service_server::DirectorService for DirectorService {
    async fn regions(&self, _: Request<v1::RegionsRequest>) -> Result<Response<v1::RegionsResponse>, Status> {
        Ok(Response::new(self.about.regions()))
    }
}

/// What a node with this map answers.
pub fn regions(map: &ClusterMap, node: &str, heard: Option<Heard>) -> v1::RegionsResponse {
    let gateway = |(id, node): (&NodeId, &NodeEntry)| {
        let address = match &node.gateway {
            Gateway::Here => node.addr.clone(),
            Gateway::At(address) => address.clone(),
            Gateway::Nowhere => return None,
        };
        Some(v1::GatewayPlace { node: *id, address, state: state_of(node).into() })
    };
    let place = |name: &str, role: &str| {
        let here = map.nodes.iter().filter(|(_, node)| node.region == name);
        let gateways: Vec<v1::GatewayPlace> = here.filter_map(gateway).collect();
        let up = gateways.iter().any(|gateway| matches!(gateway.state.as_str(), "member" | "draining"));
        v1::RegionPlace { name: name.into(), role: role.into(), up, gateways }
    };
    let regions = match &map.regions {
        None => vec![place("", "primary")],
        Some(regions) => {
            let role = |name: &String| match name {
                name if *name == regions.primary => "primary",
                name if Some(name) == regions.witness.as_ref() => "witness",
                _ => "follower",
            };
            regions.names.iter().map(|name| place(name, role(name))).collect()
        }
    };
    v1::RegionsResponse {
        primary: map.primary().into(),
        epoch: map.epoch(),
        map_version: map.version,
        node: node.into(),
        heard_ms: heard.map(|heard| heard.at.elapsed().as_millis() as u64),
        told_version: heard.map_or(0, |heard| heard.version),
        regions,
        change: map.regions.as_ref().and_then(|regions| regions.change.as_ref()).map(change_of),
    }
}

/// Of several answers the one that knows most.
pub fn newest(answers: impl IntoIterator<Item = v1::RegionsResponse>) -> Option<v1::RegionsResponse> {
    answers.into_iter().max_by_key(|answer| (answer.epoch, answer.map_version))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::map::Liveness;
    use crate::control::regions::testing::config;
    use crate::error::Error;
    use std::collections::BTreeMap;

    #[test]
    fn an_answer_names_each_region_s_gateways_and_the_newest_one_counts() -> Result<(), Error> {
        let nodes: BTreeMap<NodeId, String> = (1..=7).map(|id| (id, format!("n{id}:1"))).collect();
        let map = ClusterMap::found_in(&nodes, 1, Some(&config()))?;
        let roles = crate::roles::all();
        let map = map.told(2, "n2:1", &roles, &Gateway::Nowhere).told(
            3,
            "n3:1",
            &roles,
            &Gateway::At("m:9".into()),
        );
        let map = map.heard(&BTreeMap::from([(4, Liveness::Down), (5, Liveness::Down), (6, Liveness::Lost)]));
        let answer = regions(&map, "n1", None);
        let short: Vec<_> = answer
            .regions
            .iter()
            .map(|r| (r.name.as_str(), r.role.as_str(), r.up, r.gateways.len()))
            .collect();
        assert_eq!(
            short,
            [("east", "primary", true, 2), ("north", "witness", true, 1), ("west", "follower", false, 3)]
        );
        let east: Vec<&str> = answer.regions[0].gateways.iter().map(|g| g.address.as_str()).collect();
        assert_eq!(east, ["n1:1", "m:9"]);
        assert_eq!((answer.epoch, answer.map_version, answer.heard_ms), (1, map.version, None));
        // One that is cut off has a map with a greater version of an epoch that is over.
        let old = v1::RegionsResponse { map_version: answer.map_version + 5, ..answer.clone() };
        let new = v1::RegionsResponse { epoch: 2, primary: "west".into(), ..answer };
        assert_eq!(newest([old.clone(), new.clone()]), Some(new.clone()));
        assert_eq!(newest([new.clone(), old]), Some(new));
        let single = ClusterMap::found(&nodes, 1)?;
        assert_eq!(regions(&single, "n1", None).regions[0].gateways.len(), 7);
        Ok(())
    }
}
