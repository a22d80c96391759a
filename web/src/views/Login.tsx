import {
  ActionGroup,
  Button,
  Card,
  CardBody,
  Content,
  Form,
  FormGroup,
  TextInput,
  Title,
} from "@patternfly/react-core";
import { type ReactNode, useEffect, useState } from "react";
import { arrive, logIn } from "../state/session";
import { Brand } from "./Brand";
import { Alert } from "../ui/Note";

function Lobby({ children }: { children: ReactNode }): ReactNode {
  return (
    <main className="es-lobby">
      <Card className="es-lobby-card">
        <CardBody>
          <Brand />
          {children}
        </CardBody>
      </Card>
    </main>
  );
}

export function Login({ message }: { message: string | null }): ReactNode {
  const [token, setToken] = useState("");
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    document.title = "Log in · Elemento Storage";
  }, []);
  return (
    <Lobby>
      <Title headingLevel="h1" size="xl">
        Log in
      </Title>
      <Form
        onSubmit={(event) => {
          event.preventDefault();
          setBusy(true);
          void logIn(token).finally(() => setBusy(false));
        }}
      >
        {message !== null && <Alert variant="danger" title={message} aria-live="polite" />}
        <FormGroup label="Token" fieldId="token" isRequired>
          <TextInput
            id="token"
            type="password"
            autoComplete="current-password"
            spellCheck={false}
            isRequired
            autoFocus
            value={token}
            onChange={(_event, value) => setToken(value)}
          />
        </FormGroup>
        <ActionGroup>
          <Button type="submit" isBlock isLoading={busy} isDisabled={busy || token.trim() === ""}>
            Log in
          </Button>
        </ActionGroup>
      </Form>
      <Content component="small" className="es-muted">
        An administrator makes tokens on the server: <code>elemento-storage token create CLIENT</code>. The token stays in
        this tab and is forgotten when it is closed.
      </Content>
    </Lobby>
  );
}

export function Unreachable({ message }: { message: string }): ReactNode {
  return (
    <Lobby>
      <Title headingLevel="h1" size="xl">
        No answer
      </Title>
      <Alert variant="warning" title={message} />
      <Button onClick={() => void arrive()}>Try again</Button>
    </Lobby>
  );
}
