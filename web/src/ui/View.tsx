import { Breadcrumb, BreadcrumbItem, Content, PageSection, Title } from "@patternfly/react-core";
import { type ReactNode, useEffect, useRef } from "react";
import { href } from "./route";

let first = true;

/** The frame of every view: its heading, which gets the focus when one comes here, so that screen readers say it. */
export function View(props: {
  title: string;
  under?: { label: string; route: string };
  intro?: ReactNode;
  labels?: ReactNode;
  actions?: ReactNode;
  children: ReactNode;
  /** The content fills what is left of the height, and scrolls by itself. */
  fills?: boolean;
}): ReactNode {
  const heading = useRef<HTMLHeadingElement>(null);
  const { title, under } = props;
  useEffect(() => {
    document.title = `${title} · Elemento Storage`;
  }, [title]);
  useEffect(() => {
    if (!first) heading.current?.focus({ preventScroll: true });
    first = false;
  }, []);
  return (
    <>
      <PageSection hasBodyWrapper={false} className="es-heading">
        {under && (
          <Breadcrumb>
            <BreadcrumbItem to={href(under.route)}>{under.label}</BreadcrumbItem>
            <BreadcrumbItem isActive>{title}</BreadcrumbItem>
          </Breadcrumb>
        )}
        <div className="es-heading-row">
          <div className="es-heading-title">
            <Title headingLevel="h1" size="2xl" tabIndex={-1} ref={heading} className="es-title">
              {title}
            </Title>
            {props.labels}
          </div>
          {props.actions && <div className="es-actions">{props.actions}</div>}
        </div>
        {props.intro && <Content component="p">{props.intro}</Content>}
      </PageSection>
      <PageSection hasBodyWrapper={false} isFilled={props.fills ?? false} className={props.fills ? "es-fills" : ""}>
        {props.children}
      </PageSection>
    </>
  );
}
