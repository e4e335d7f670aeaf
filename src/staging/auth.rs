//! Hops are authenticated as peer links are, with the deployment's secret.

use std::io;

use futures::future::BoxFuture;
use tokio::net::TcpStream;

use super::config::{HopAuth, HopSide};
use crate::peer::auth::{self, Side};
use crate::peer::token::Token;

/// Whoever knows the deployment's secret may send or receive weights.
#[derive(Clone, Debug)]
pub struct TokenAuth(pub Token);

impl HopAuth for TokenAuth {
    fn authenticate(
        &self,
        mut stream: TcpStream,
        side: HopSide,
    ) -> BoxFuture<'static, io::Result<TcpStream>> {
        let token = self.0.clone();
        // As on a peer link, whoever connects proves first.
        let side = match side {
            HopSide::Sender => Side::Follower,
            HopSide::Receiver => Side::Leader,
        };
        Box::pin(async move {
            auth::authenticate(&mut stream, side, &token).await.map_err(io::Error::other)?;
            Ok(stream)
        })
    }
}
