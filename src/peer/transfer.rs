//! Connections on which weights go from node to node: proven with the same secret as the peer link, in roles
//! of their own.

use std::io;

use futures::future::BoxFuture;
use tokio::net::TcpStream;

use super::auth::{AuthError, Side, authenticate};
use crate::staging::{TransferAuth, TransferSide};
use crate::token::Token;

/// Lets in who knows the secret of the deployment.
#[derive(Clone, Debug)]
pub struct TokenAuth(pub Token);

impl TransferAuth for TokenAuth {
    fn authenticate(
        &self,
        mut stream: TcpStream,
        side: TransferSide,
    ) -> BoxFuture<'static, io::Result<TcpStream>> {
        let token = self.0.clone();
        let side = match side {
            TransferSide::Sender => Side::Sender,
            TransferSide::Receiver => Side::Receiver,
        };
        Box::pin(async move {
            match authenticate(&mut stream, side, &token).await {
                Ok(()) => Ok(stream),
                Err(AuthError::Io(error)) => Err(error),
                Err(error) => Err(io::Error::new(io::ErrorKind::PermissionDenied, error.to_string())),
            }
        })
    }
}
