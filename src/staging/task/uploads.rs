//! Uploads: they have the spare segment until an update takes it.

use super::*;

impl Task {
    pub(super) fn session(&self, id: &str) -> Option<Arc<Session>> {
        self.uploads.as_ref()?.sessions.lock().get(id)
    }

    pub(super) fn end_session(&self, id: &str) {
        if let Some(uploads) = &self.uploads {
            uploads.sessions.lock().end(id);
        }
    }

    pub(super) fn begin_upload(&mut self, spec: StageSpec, name: &str) -> Result<()> {
        let session = self.session(name);
        let session = session.ok_or_else(|| refused(format!("there is no upload {name:?}")))?;
        let spare = self.uploading.as_mut().filter(|uploading| uploading.id == name);
        let spare = spare.and_then(|uploading| uploading.spare.take());
        let spare = spare.ok_or_else(|| refused(format!("upload {name:?} is in use")))?;
        self.start(spec, Origin::Upload(session.fill(), spare), None);
        Ok(())
    }

    /// Takes the segment from an upload that nobody touched for long.
    pub(super) async fn displace_upload(&mut self) -> Result<()> {
        let Some(uploading) = &self.uploading else { return Ok(()) };
        let idle = self.session(&uploading.id).is_none_or(|session| session.idle() > IDLE_LIMIT);
        if uploading.spare.is_none() || !idle {
            return Err(refused(format!("upload {:?} has the spare segment", uploading.id)));
        }
        warn!(upload = uploading.id, "giving up an abandoned upload");
        self.drop_upload().await
    }

    pub(super) async fn drop_upload(&mut self) -> Result<()> {
        let Some(uploading) = self.uploading.take() else { return Ok(()) };
        let contents = self.session(&uploading.id).map(|session| session.fill().contents());
        self.end_session(&uploading.id);
        match uploading.spare {
            Some(spare) => self.with_area(move |area| area.give_back(spare, contents, None)).await,
            None => Ok(()),
        }
    }

    pub(super) async fn upload(&mut self, ask: Ask) {
        match ask {
            Ask::Create { id, files, reply } => self.create_upload(id, files, reply).await,
            Ask::Discard { id, reply } => {
                let free =
                    self.uploading.as_ref().map(|uploading| (uploading.id == id, uploading.spare.is_some()));
                let result = match free {
                    Some((true, true)) => {
                        let dropped = self.drop_upload().await;
                        let node = &self.config.node;
                        dropped.map_err(|error| UploadError::Gone { id, reason: error.on(node) })
                    }
                    Some((true, false)) => {
                        Err(UploadError::Busy { id, reason: "an update takes it".to_owned() })
                    }
                    _ => Err(UploadError::Unknown { id }),
                };
                let _ = reply.send(result);
            }
        }
    }

    async fn create_upload(
        &mut self,
        id: String,
        files: Vec<FileSize>,
        reply: oneshot::Sender<std::result::Result<UploadStatus, UploadError>>,
    ) {
        match (self.begin_creation(id, files).await, &mut self.uploading) {
            // Answered when its segment is ready.
            (Ok(None), Some(uploading)) => uploading.created.push(reply),
            (created, _) => {
                let _ = created.transpose().map(|created| reply.send(created));
            }
        }
    }

    /// What is there of an upload; `None` while its segment is being prepared.
    async fn begin_creation(
        &mut self,
        id: String,
        mut files: Vec<FileSize>,
    ) -> std::result::Result<Option<UploadStatus>, UploadError> {
        files.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(uploading) = self.uploading.as_ref().filter(|uploading| uploading.id == id) {
            if uploading.files != files {
                return Err(UploadError::Invalid { id, reason: "it was begun with other files".to_owned() });
            }
            return Ok(self.session(&id).map(|session| {
                session.touch();
                session.status()
            }));
        }
        let layout = match Layout::new(self.config.chunk, files.clone()) {
            Ok(layout) => layout,
            Err(reason) => return Err(UploadError::Invalid { id, reason }),
        };
        let taken = match self.displace_upload().await {
            Ok(()) => self.take(Retain::Memory).await,
            Err(error) => Err(error),
        };
        let mut spare = match taken {
            Ok(spare) => spare,
            Err(error) => return Err(UploadError::Busy { id, reason: error.on(&self.config.node) }),
        };
        self.uploading = Some(Uploading { id: id.clone(), files, spare: None, created: Vec::new() });
        let (notes, config) = (self.notes.clone(), Arc::clone(&self.config));
        self.tracker.spawn_blocking(move || {
            let fill = spare.prepare(layout, &|| false).map(|fill| {
                let journal = Journal::begin(&config.state_dir, &id, spare.name(), fill.layout());
                let journal = journal.inspect_err(|error| {
                    warn!(%error, upload = id, "after a restart of the sidecar this upload begins again");
                });
                (Arc::new(fill), journal.ok())
            });
            let _ = notes.blocking_send(Note::UploadReady { id, spare: Box::new(spare), fill });
        });
        Ok(None)
    }

    /// The upload that a predecessor took.
    pub(super) fn go_on_with_upload(&mut self, kept: Kept) {
        let Kept { id, spare, fill, journal } = kept;
        let files = fill.layout().files().to_vec();
        let session = Arc::new(Session::new(id.clone(), fill, Some(journal)));
        let UploadStatus { received, total, .. } = session.status();
        info!(upload = id, received, total, "an upload goes on where it was");
        if let Some(uploads) = &self.uploads {
            uploads.sessions.lock().open(session);
        }
        self.uploading = Some(Uploading { id, files, spare: Some(spare), created: Vec::new() });
    }

    pub(super) async fn upload_ready(
        &mut self,
        id: String,
        spare: Spare,
        fill: Result<(Arc<Fill>, Option<Journal>)>,
    ) {
        let Some(uploading) = self.uploading.as_mut().filter(|uploading| uploading.id == id) else {
            return self.give_back(spare).await;
        };
        let replies = std::mem::take(&mut uploading.created);
        let answer = match fill {
            Ok((fill, journal)) => {
                uploading.spare = Some(spare);
                let session = Arc::new(Session::new(id, fill, journal));
                session.touch();
                let status = session.status();
                if let Some(uploads) = &self.uploads {
                    uploads.sessions.lock().open(session);
                }
                Ok(status)
            }
            Err(error) => {
                self.uploading = None;
                self.give_back(spare).await;
                Err(UploadError::NoSpace { id, reason: error.on(&self.config.node) })
            }
        };
        for reply in replies {
            let _ = reply.send(answer.clone());
        }
    }

    /// A segment with which nothing was done.
    async fn give_back(&mut self, spare: Spare) {
        if let Err(error) = self.with_area(move |area| area.give_back(spare, None, None)).await {
            error!(%error, "what is in shared memory cannot be noted");
        }
    }
}
